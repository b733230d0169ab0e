"""Logits on a device -> the highest few of some of their rows, on the host.

A small graph does it there, so that a step brings a few numbers to the host and no vocabulary for
every row. The exporter writes it (loraexport/export/steps.py), and says there why rows are cut.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...device.dtypes import ONNX_TYPES
from ...device.memory import host_value
from ...device.ort_session import open_session
from ...device.providers import session_device

_PARTS = 128
"""The most parts that a row is cut into."""


class _OfLogits:
    """A small graph over logits [batch, n, vocabulary] that lie on a device."""

    def __init__(
        self,
        file: Path,
        dtype: str,
        vocabulary: int,
        providers: list[tuple[str, dict[str, Any]]],
    ) -> None:
        """`file`: of the graph."""
        # One thread: no second pool of threads that spin beside the decoder's.
        self._session = open_session(file, providers, {}, 1)
        self._device = session_device(providers[0])
        self._dtype, self._vocabulary = dtype, vocabulary

    def _bind(self, address: int, shape: Sequence[int]) -> Any:
        """A binding whose logits lie there."""
        binding = self._session.io_binding()
        place = (*self._device, ONNX_TYPES[self._dtype], list(shape), address)
        binding.bind_input("logits", *place)
        return binding


class TopTokens(_OfLogits):
    """logits [batch, n, vocabulary] -> the highest of every row, from the highest down.

    To draw from them: the likeliest alone comes from the decoder's graph itself (next_inputs.py).
    Not captured: replays of a second CUDA graph of TopK gave tokens that no row had.
    """

    def bind(
        self, address: int, shape: Sequence[int], rows: np.ndarray, num: int
    ) -> "BoundTopTokens":
        """The work on one buffer of logits, to be run as often as it is filled.

        Args:
            address, shape: of the logits [batch, n, vocabulary] on the device.
            rows: int64 [m], into the batch * n rows of the logits.
            num: how many of each.
        """
        binding = self._bind(address, shape)
        parts = max(divisor for divisor in range(1, _PARTS + 1) if self._vocabulary % divisor == 0)
        width = self._vocabulary // parts
        per_part = min(num, width)
        first = np.tile(np.arange(parts) * width, len(rows))
        inputs = {
            "rows": rows,
            "cut": np.array([-1, width]),
            "own": np.array([per_part]),
            "first": first[:, None],
            "joined": np.array([len(rows), parts * per_part]),
            "count": np.array([num]),
        }
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, host_value(array, "int64"))
        return BoundTopTokens(self._session, binding, (len(rows), num), inputs)


class RowLogits(_OfLogits):
    """logits [batch, n, vocabulary] on a device -> some of their rows on the host, float32."""

    def read(self, memory: ort.OrtValue, shape: Sequence[int], rows: np.ndarray) -> np.ndarray:
        """float32 [m, vocabulary].

        Args:
            memory, shape: of the logits on the device.
            rows: int64 [m], into the batch * n rows of the logits.
        """
        binding = self._bind(memory.data_ptr(), shape)
        binding.bind_ortvalue_input("rows", host_value(np.ascontiguousarray(rows), "int64"))
        wide = np.empty((len(rows), self._vocabulary), np.float32)
        binding.bind_output("wide", "cpu", 0, ONNX_TYPES["float32"], wide.shape, wide.ctypes.data)
        self._session.run_with_iobinding(binding)
        return wide


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
