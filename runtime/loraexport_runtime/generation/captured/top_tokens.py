"""Logits on a device -> the highest few of some of their rows, on the host.

A small graph does it there, so that a step brings a few numbers to the host and no vocabulary for
every row. CUDA's TopK gives each row one block, so rows are cut into parts, and the highest of
their highest are the row's.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from ...device.dtypes import ONNX_TYPES
from ...device.memory import host_value
from ...device.ort_session import quiet_options
from ...device.providers import session_device
from .onnx_bytes import field, graph, node, value

_PARTS = 128
"""The most parts that a row is cut into."""


class TopTokens:
    """logits [batch, n, vocabulary] -> the highest of every row, from the highest down.

    To draw from them: the likeliest alone comes from the decoder's graph itself (next_inputs.py).
    Not captured: replays of a second CUDA graph of TopK gave tokens that no row had.
    """

    def __init__(
        self, dtype: str, vocabulary: int, providers: Sequence[tuple[str, dict[str, Any]]]
    ) -> None:
        # One thread: no second pool of threads that spin beside the decoder's.
        self._session = ort.InferenceSession(
            _graph(dtype), quiet_options(1), providers=list(providers), enable_fallback=0
        )
        self._device = session_device(providers[0])
        self._dtype = dtype
        self._vocabulary = vocabulary

    def bind(
        self, address: int, shape: Sequence[int], rows: np.ndarray, num: int
    ) -> "BoundTopTokens":
        """The work on one buffer of logits, to be run as often as it is filled.

        Args:
            address, shape: of the logits [batch, n, vocabulary] on the device.
            rows: int64 [m], into the batch * n rows of the logits.
            num: how many of each.
        """
        binding = self._session.io_binding()
        place = (*self._device, ONNX_TYPES[self._dtype], list(shape), address)
        binding.bind_input("logits", *place)
        parts = max(one for one in range(1, _PARTS + 1) if self._vocabulary % one == 0)
        width = self._vocabulary // parts
        own = min(num, width)
        first = np.tile(np.arange(parts) * width, len(rows))
        inputs = {
            "rows": rows,
            "cut": np.array([-1, width]),
            "own": np.array([own]),
            "first": first[:, None],
            "joined": np.array([len(rows), parts * own]),
            "count": np.array([num]),
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, host_value(array, "int64"))
        return BoundTopTokens(self._session, binding, (len(rows), num), inputs)


class BoundTopTokens:
    """One buffer of logits, and memory on the host for what is highest in it."""

    def __init__(
        self, session: ort.InferenceSession, binding: Any, shape: tuple[int, int], alive: Any
    ) -> None:
        self._session = session
        self._binding = binding
        self._alive = alive
        self.values = np.empty(shape, np.float32)
        self.tokens = np.empty(shape, np.int64)
        for name, array in (("values", self.values), ("tokens", self.tokens)):
            dtype = ONNX_TYPES[str(array.dtype)]
            binding.bind_output(name, "cpu", 0, dtype, array.shape, array.ctypes.data)

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """(logits float32, tokens int64), each [m, num]; valid until the next run."""
        self._session.run_with_iobinding(self._binding)
        return self.values, self.tokens


def _graph(dtype: str) -> bytes:
    """An onnx.ModelProto.

    The parts: x [m * parts, width] = Cast(Gather(Flatten(logits), rows)); their highest `own` of
    x, of which the token is `first` of the part and the place in it; of all of a row the highest
    `count`.
    """
    nodes = [
        node("Flatten", ["logits"], ["flat"], axis=2),
        node("Gather", ["flat", "rows"], ["taken"]),
        node("Cast", ["taken"], ["wide"], to=ONNX_TYPES["float32"]),
        node("Reshape", ["wide", "cut"], ["parts"]),
        node("TopK", ["parts", "own"], ["part_values", "places"]),
        node("Add", ["places", "first"], ["part_tokens"]),
        node("Reshape", ["part_values", "joined"], ["row_values"]),
        node("Reshape", ["part_tokens", "joined"], ["row_tokens"]),
        node("TopK", ["row_values", "count"], ["values", "chosen"]),
        node("GatherElements", ["row_tokens", "chosen"], ["tokens"], axis=1),
    ]
    inputs = [value("logits", dtype, ["batch", "n", "vocabulary"])]
    shapes: dict[str, list[str | int]] = {
        "rows": ["m"],
        "cut": [2],
        "own": [1],
        "first": ["m_parts", 1],
        "joined": [2],
        "count": [1],
    }
    inputs += [value(name, "int64", shape) for name, shape in shapes.items()]
    outputs = [value("values", "float32", ["m", "k"]), value("tokens", "int64", ["m", "k"])]
    named = field(2, "top_tokens") + graph(nodes, inputs, outputs)
    opset = field(1, "") + field(2, 17)
    return field(1, 8) + field(7, named) + field(8, opset)  # IR version 8
