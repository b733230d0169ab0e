"""Inputs that all cases of a layer share."""

from collections.abc import Sequence

import numpy as np

from loraexport_runtime.checking.layers import Case
from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.device.dtypes import NUMPY_DTYPES


def make_input(layer: Layer, cases: Sequence[Case], dtype: str, seed: int) -> np.ndarray:
    """x [T, in] standard normal in the export's dtype, or ids int64 [T]; T serves every case."""
    digits = [ord(letter) for letter in layer.name]
    generator = np.random.default_rng([seed, *digits])
    num_tokens = max(case.num_tokens for case in cases)
    if layer.kind == "embedding":
        return generator.integers(0, layer.in_features, num_tokens)
    return generator.standard_normal((num_tokens, layer.in_features)).astype(NUMPY_DTYPES[dtype])
