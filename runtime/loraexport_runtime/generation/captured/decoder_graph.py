"""What a decoder's graph takes and gives, read from its session."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import onnxruntime as ort

from ...device.dtypes import FLOAT_TYPES, ONNX_TYPES
from .next_inputs import next_inputs


@dataclass(frozen=True)
class DecoderGraph:
    """A session, and what its graph takes and gives."""

    session: ort.InferenceSession
    device: tuple[str, int]
    capture: bool
    inputs: frozenset[str]
    """Those of a batch: input_ids, attention_mask and the like, and the tail's."""
    next: Mapping[str, str]
    """Input of a step -> the output that becomes the next step's."""
    present: Mapping[str, str]
    """Input -> output of every layer's keys and values."""
    cache_dtype: str
    heads: int
    head_size: int
    logits_dtype: str
    vocabulary: int
    _graph_ids: Iterator[int] = field(default_factory=lambda: count(1))

    def allocate(self, shape: list[int], dtype: str) -> ort.OrtValue:
        """Memory on the session's device."""
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[dtype], *self.device)

    def upload(self, array: np.ndarray) -> ort.OrtValue:
        """int64 in memory of its own on the session's device."""
        value = self.allocate(list(array.shape), "int64")
        value.update_inplace(array)
        return value

    def next_graph_id(self) -> int:
        """For a graph to capture; none is given twice, as none may be replayed on other memory."""
        return next(self._graph_ids)


def read_decoder_graph(
    session: ort.InferenceSession,
    decoder: Mapping[str, Any],
    device: tuple[str, int],
    capture: bool,
) -> DecoderGraph:
    """The graph of a session, with its tail; `decoder`: of genai_config.json."""
    taken = {one.name: one for one in session.get_inputs()}
    given = {output.name: output for output in session.get_outputs()}
    names = decoder["inputs"], decoder["outputs"]
    present = {
        names[0][f"past_{part}_names"] % layer: names[1][f"present_{part}_names"] % layer
        for layer in range(int(decoder["num_hidden_layers"]))
        for part in ("key", "value")
    }
    logits = given["logits"]
    return DecoderGraph(
        session=session,
        device=device,
        capture=capture,
        inputs=frozenset(taken) - frozenset(present),
        next=next_inputs(decoder["inputs"].values()),
        present=present,
        cache_dtype=FLOAT_TYPES[taken[next(iter(present))].type],
        heads=int(decoder["num_key_value_heads"]),
        head_size=int(decoder["head_size"]),
        logits_dtype=FLOAT_TYPES[logits.type],
        vocabulary=int(logits.shape[2]),
    )
