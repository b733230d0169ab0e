"""The keys and values of a fixed number of rows, each of one length; past and present are one.

A row lies in one piece, [heads, length, size], so that the graph reads and writes it, or the first
so many rows, where they are: a run has the same addresses every time, as a CUDA graph wants it.
"""

import numpy as np

from ...device.cuda_memory import CudaMemory
from ...device.dtypes import NUMPY_DTYPES
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
        if stop <= start:
            return
        for memory in self._memory.values():
            memory.clear(row, start, stop)
        memory.wait()

    def copy(self, source: int, target: int, stop: int, other: "Cache | None" = None) -> None:
        """The first positions of a row to another row, of which the rest stays.

        Args:
            other: the cache that has the source, on the same device; None: this one.
        """
        if (other is None and source == target) or stop == 0:
            return
        sources = (other or self)._memory
        for name, memory in self._memory.items():
            memory.copy(source, target, stop, sources[name])
        memory.wait()

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

    def copy(self, source: int, target: int, stop: int, other: "_Memory") -> None:
        assert isinstance(other, _HostMemory), "of the same device"
        self._array[target, :, :stop] = other._array[source, :, :stop]

    def wait(self) -> None:
        """What was begun is done already."""


class _DeviceMemory:
    """The same on a device."""

    def __init__(self, graph: DecoderGraph, rows: int, length: int) -> None:
        self._heads = graph.heads
        self._line = graph.head_size * NUMPY_DTYPES[graph.cache_dtype].itemsize
        self._pitch = length * self._line
        """Bytes from a head to the next one."""
        self._value = graph.allocate(
            [rows * graph.heads * length, graph.head_size], graph.cache_dtype
        )
        self._cuda = CudaMemory(graph.device[1])
        self._cuda.zero(self.address(0), self._pitch, self._pitch, rows * graph.heads)
        self.wait()

    def address(self, row: int) -> int:
        return int(self._value.data_ptr()) + row * self._heads * self._pitch

    def clear(self, row: int, start: int, stop: int) -> None:
        place = self.address(row) + start * self._line
        self._cuda.zero(place, self._pitch, (stop - start) * self._line, self._heads)

    def copy(self, source: int, target: int, stop: int, other: "_Memory") -> None:
        assert isinstance(other, _DeviceMemory), "of the same device"
        places = (other.address(source), other._pitch), (self.address(target), self._pitch)
        self._cuda.copy(*places, stop * self._line, self._heads)

    def wait(self) -> None:
        self._cuda.wait()


_Memory = _HostMemory | _DeviceMemory
