"""Logits brought whole to the host, where an artifact of format 4 has no graphs to choose there."""

import math
from collections.abc import Sequence

import numpy as np
import onnxruntime as ort

from .next_inputs import NO_TOKEN


class HostLogits:
    """logits [batch, n, vocabulary] on a device -> some of their rows on the host, float32."""

    def read(self, memory: ort.OrtValue, shape: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """As RowLogits.read."""
        values: np.ndarray = memory.numpy().reshape(-1)[: math.prod(shape)]
        wide: np.ndarray = values.reshape(-1, shape[-1])[rows].astype(np.float32)
        return wide


def likeliest_tokens(logits: np.ndarray) -> np.ndarray:
    """int64 [m] of logits float32 [m, vocabulary], as a step's graph gives them."""
    return np.where(np.isnan(logits).any(axis=1), NO_TOKEN, logits.argmax(axis=1))
