"""The keys and values of a fixed number of rows, each of one length; past and present are one.

A row lies in one piece, [heads, length, size], so that the graph reads and writes it, or the first
so many rows, where they are: a run has the same addresses every time, as a CUDA graph wants it.
"""

from typing import Any

import numpy as np
import onnxruntime as ort

from ...device.dlpack import rows_view
from ...device.dtypes import NUMPY_DTYPES
from ...device.memory import host_value
from .decoder_graph import DecoderGraph


class Cache:
    """The memory of all layers' keys and values, zero at first."""

    def __init__(self, graph: DecoderGraph, rows: int, length: int) -> None:
        self.rows, self.length = rows, length
        self._graph = graph
        kind: type[_HostMemory] | type[_DeviceMemory]
        kind = _HostMemory if graph.device[0] == "cpu" else _DeviceMemory
        self._memory = {name: kind(graph, rows, length) for name in graph.present}

    def places(self, row: int, num: int) -> dict[str, tuple[list[int], int]]:
        """Shape and address of the memory of `num` rows from `row` on, by the graph's input."""
        shape = [num, self._graph.heads, self.length, self._graph.head_size]
        return {name: (shape, memory.address(row)) for name, memory in self._memory.items()}

    def clear(self, row: int, start: int, stop: int) -> None:
        """Zeros from one position of a row to another: a kernel multiplies by 0 what an earlier
        text left behind a row's end, which is no number for what was none."""
        for memory in self._memory.values() if stop > start else ():
            memory.clear(row, start, stop)

    def copy(self, source: int, target: int, stop: int) -> None:
        """The first positions of a row to another row, of which the rest stays or is copied too."""
        for memory in self._memory.values() if source != target else ():
            memory.copy(source, target, stop)

    def release(self) -> None:
        """Give the memory up."""
        self._memory.clear()


class _HostMemory:
    """Of one layer's keys or values; its pages are taken as they are written."""

    def __init__(self, graph: DecoderGraph, rows: int, length: int) -> None:
        shape = (rows, graph.heads, length, graph.head_size)
        self._array = np.zeros(shape, NUMPY_DTYPES[graph.cache_dtype])

    def address(self, row: int) -> int:
        return int(self._array.ctypes.data + row * self._array.strides[0])

    def clear(self, row: int, start: int, stop: int) -> None:
        self._array[row, :, start:stop] = 0

    def copy(self, source: int, target: int, stop: int) -> None:
        self._array[target, :, :stop] = self._array[source, :, :stop]


class _DeviceMemory:
    """The same on a device."""

    def __init__(self, graph: DecoderGraph, rows: int, length: int) -> None:
        self._dtype, self._heads, self._length = graph.cache_dtype, graph.heads, length
        self._width = graph.head_size
        self._size = rows * graph.heads * length
        self._value = graph.allocate([self._size, self._width], self._dtype)
        row = np.zeros((graph.heads * length, self._width), NUMPY_DTYPES[self._dtype])
        self._zeros: Any = graph.allocate(list(row.shape), self._dtype)
        self._zeros.update_inplace(host_value(row, self._dtype))
        for index in range(rows):
            self.clear(index, 0, length)

    def address(self, row: int) -> int:
        lines = row * self._heads * self._length
        itemsize = NUMPY_DTYPES[self._dtype].itemsize
        return int(self._value.data_ptr() + lines * self._width * itemsize)

    def clear(self, row: int, start: int, stop: int) -> None:
        first = row * self._heads * self._length
        if start == 0:  # in one piece
            self._view(self._value, first, self._heads * self._length).update_inplace(self._zeros)
            return
        zeros = self._view(self._zeros, 0, stop - start)
        for head in range(self._heads):
            at = first + head * self._length + start
            self._view(self._value, at, stop - start).update_inplace(zeros)

    def copy(self, source: int, target: int, stop: int) -> None:
        lines = self._heads * self._length  # all of it in one piece, whatever `stop` is
        into = self._view(self._value, target * lines, lines)
        into.update_inplace(self._view(self._value, source * lines, lines))

    def _view(self, value: ort.OrtValue, first: int, num: int) -> ort.OrtValue:
        return rows_view(value, slice(first, first + num), self._width, self._dtype)
