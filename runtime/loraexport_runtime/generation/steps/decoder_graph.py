"""What a decoder's graph takes and gives, read from its session."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import onnxruntime as ort

from ...contract.kinds import ADAPTER_WEIGHTS
from ...device.dtypes import FLOAT_TYPES, ONNX_TYPES
from ...errors import ArtifactError
from ..rope import READ_LENGTHS
from .next_inputs import next_inputs


@dataclass(frozen=True)
class DecoderGraph:
    """A session, and what its graph takes and gives."""

    session: ort.InferenceSession
    device: tuple[str, int]
    capture: bool
    inputs: frozenset[str]
    """Those of a batch: input_ids, attention_mask and the like, and of the next step's."""
    next: Mapping[str, str]
    """Input of a step -> the output that becomes the next step's; none where the host does it."""
    present: Mapping[str, str]
    """Input -> output of every layer's keys and values."""
    cache_dtype: str
    heads: int
    head_size: int
    logits_dtype: str
    vocabulary: int
    tells_all: bool = False
    """Whether it has logits after every token that it reads, and not those of ROWS alone: the
    decoder's own graph, of which an artifact of format 4 has no other."""
    takes_lengths: bool = False
    """Whether a part of a prompt can be read as the whole (see rope.py)."""
    blend_slots: int | None = None
    """How many slots a row may blend; None: it uses one."""
    _graph_ids: Iterator[int] = field(default_factory=lambda: count(1))

    def allocate(self, shape: list[int], dtype: str) -> ort.OrtValue:
        """Memory on the session's device."""
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[dtype], *self.device)

    def upload(self, array: np.ndarray) -> ort.OrtValue:
        """An array in memory of its own on the session's device."""
        value = self.allocate(list(array.shape), array.dtype.name)
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
    has_next: bool = True,
) -> DecoderGraph:
    """The graph of a session.

    Args:
        decoder: of genai_config.json.
        has_next: it gives what the next step takes.
    """
    inputs = {entry.name: entry for entry in session.get_inputs()}
    outputs = {output.name: output for output in session.get_outputs()}
    named = {name for name in decoder["inputs"].values() if "%d" not in name}
    if missing := sorted(named - set(inputs)):
        raise ArtifactError(
            f"genai_config.json names the input {missing[0]!r}, and the graph has no such input;"
            " build the artifact again"
        )
    names = decoder["inputs"], decoder["outputs"]
    present = {
        names[0][f"past_{part}_names"] % layer: names[1][f"present_{part}_names"] % layer
        for layer in range(int(decoder["num_hidden_layers"]))
        for part in ("key", "value")
    }
    logits = outputs["logits"]
    optional = {entry.name: entry for entry in session.get_overridable_initializers()}
    weights = optional.get(ADAPTER_WEIGHTS)
    blended = frozenset() if weights is None else frozenset({ADAPTER_WEIGHTS})
    return DecoderGraph(
        session=session,
        device=device,
        capture=capture,
        tells_all=not has_next,
        takes_lengths=READ_LENGTHS in optional,
        blend_slots=None if weights is None else int(weights.shape[1]),
        inputs=(frozenset(inputs) - frozenset(present)) | blended,
        next=next_inputs(decoder["inputs"].values()) if has_next else {},
        present=present,
        cache_dtype=FLOAT_TYPES[inputs[next(iter(present))].type],
        heads=int(decoder["num_key_value_heads"]),
        head_size=int(decoder["head_size"]),
        logits_dtype=FLOAT_TYPES[logits.type],
        vocabulary=int(logits.shape[2]),
    )
