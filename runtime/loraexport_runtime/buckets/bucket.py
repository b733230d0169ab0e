"""Batches padded to a few fixed sizes over fixed memory, so that CUDA graphs can replay them."""

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import onnxruntime as ort

from ..device.dlpack import rows_view
from ..device.dtypes import NUMPY_DTYPES, ONNX_TYPES
from ..device.memory import host_value

Tensors = Mapping[str, tuple[Sequence[int], str]]
"""Name -> shape and dtype."""

_ALIGNED = 32
"""Arrays in one block start at a multiple of so many elements: 256 bytes, as CUDA likes it."""
_VIEWS = 4096
"""A bucket keeps so many views of its first rows."""


class Bucket:
    """One size of batch: memory of its own, bound once. What a batch does not fill is padding.

    Padding holds what an earlier batch left there, so it is as valid as a batch is, and its outputs
    are never read. Not for two threads at once: hold `Replays.running`.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: Tensors,
        outputs: Tensors,
        device: tuple[str, int],
        options: ort.RunOptions | None,
    ) -> None:
        """
        Args:
            inputs: those of int64 lie in one block, which one copy brings to the device.
            options: with the id of the graph to capture; None: nothing is captured.
        """
        self.session, self.options = session, options
        self.size = ", ".join(f"{name} {list(shape)}" for name, (shape, _) in inputs.items())
        self.binding = session.io_binding()
        self._device = device
        self._tensors = {**inputs, **outputs}
        self._places: dict[str, tuple[ort.OrtValue, int]] = {}
        self._views: dict[tuple[str, int, str], ort.OrtValue] = {}
        self._place_block([name for name, (_, dtype) in inputs.items() if dtype == "int64"])
        for name, (shape, dtype) in self._tensors.items():
            if name in self._places:
                continue
            self._places[name] = (self._allocate(shape, dtype), 0)
            if name in inputs:
                zeros = np.zeros(shape, NUMPY_DTYPES[dtype])
                self._places[name][0].update_inplace(host_value(zeros, dtype))
                self.binding.bind_ortvalue_input(name, self._places[name][0])
            else:
                self.binding.bind_ortvalue_output(name, self._places[name][0])

    def _place_block(self, names: Sequence[str]) -> None:
        sizes = [-(-prod(self._tensors[name][0]) // _ALIGNED) * _ALIGNED for name in names]
        starts = np.cumsum([0, *sizes]).tolist()
        self._staged = np.zeros(starts[-1], np.int64)
        self._block = self._allocate([starts[-1]], "int64")
        self.host: dict[str, np.ndarray] = {}
        """The int64 inputs, to be filled on the host ahead of `send`."""
        for name, start in zip(names, starts, strict=False):
            shape = list(self._tensors[name][0])
            self.host[name] = self._staged[start : start + prod(shape)].reshape(shape)
            self._places[name] = (self._block, start)
            address = self._block.data_ptr() + start * 8
            self.binding.bind_input(name, *self._device, ONNX_TYPES["int64"], shape, address)

    def send(self) -> None:
        """Copy the int64 inputs from `host` to the device."""
        self._block.update_inplace(self._staged)

    def write(self, name: str, rows: np.ndarray | ort.OrtValue) -> None:
        """Overwrite the first rows of an input; an int64 one on the device after `send` only."""
        view = self._rows(name, rows.shape[0] if isinstance(rows, np.ndarray) else rows.shape()[0])
        if isinstance(rows, np.ndarray):
            rows = host_value(np.ascontiguousarray(rows), self._tensors[name][1])
        view.update_inplace(rows)

    def read(self, name: str, num_rows: int) -> np.ndarray:
        """The first rows of an output, as an array of the caller's own."""
        shape, dtype = self._tensors[name]
        # numpy knows no bfloat16, and onnxruntime does not know ml_dtypes' one.
        carried = "float16" if dtype == "bfloat16" else dtype
        array = self._rows(name, num_rows, carried).numpy()
        if self._device[0] == "cpu":
            array = array.copy()  # onnxruntime gives its own memory there
        return array.view(NUMPY_DTYPES[dtype]).reshape(num_rows, *shape[1:])

    def copy(self, name: str, num_rows: int) -> ort.OrtValue:
        """The first rows of an output, as device memory of the caller's own."""
        shape, dtype = self._tensors[name]
        value = self._allocate([num_rows, *shape[1:]], dtype)
        value.update_inplace(self._rows(name, num_rows))
        # A copy on the device need not have ended, and the caller may read on any stream.
        self.binding.synchronize_outputs()
        return value

    def _rows(self, name: str, num_rows: int, carried: str | None = None) -> ort.OrtValue:
        """The first rows as a matrix, which is a view; `carried`: as another dtype of its size."""
        shape, dtype = self._tensors[name]
        key = (name, num_rows, carried or dtype)
        view = self._views.get(key)
        if view is None:
            if len(self._views) >= _VIEWS:
                self._views.clear()
            memory, start = self._places[name]
            if start % (width := prod(shape[1:])):
                rows, width = slice(start, start + num_rows * width), 1
            else:
                rows = slice(start // width, start // width + num_rows)
            view = self._views[key] = rows_view(memory, rows, width, carried or dtype)
        return view

    def _allocate(self, shape: Sequence[int], dtype: str) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), ONNX_TYPES[dtype], *self._device
        )
