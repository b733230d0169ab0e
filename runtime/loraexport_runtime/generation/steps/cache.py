"""The keys and values of a fixed number of rows, each of one length; past and present are one.

A row lies in one piece, [heads, length, size], so that the graph reads and writes it, or the first
so many rows, where they are: a run has the same addresses every time, as a CUDA graph wants it.
"""

import math

import numpy as np
import onnxruntime as ort

from ...device.cuda_memory import CudaMemory, Pieces
from ...device.dtypes import NUMPY_DTYPES
from .decoder_graph import DecoderGraph

_WHOLE = 1 << 28
"""Bytes of a row that is cleared whole, in one launch and 0.1 ms at most, where a part of it from
the beginning is to be: that takes a launch for each layer."""


class Cache:
    """The memory of all layers' keys and values, zero at first.

    What clears and copies has been done after `wait`, behind which a run may come.
    """

    def __init__(
        self, graph: DecoderGraph, rows: int, length: int, within: "Cache | None" = None
    ) -> None:
        """`within`: a cache whose memory it takes for itself, of as many tokens at least."""
        self.rows, self.length = rows, length
        self._shape = [graph.heads, length, graph.head_size]
        kind = _HostMemory if graph.device[0] == "cpu" else _DeviceMemory
        whole = None if within is None else within._there()
        self._memory: _Memory | None = kind(graph, rows, length, whole)
        self._names = list(graph.present)

    def places(self, row: int, num: int) -> dict[str, tuple[list[int], int]]:
        """Shape and address of the memory of `num` rows from `row` on, by the graph's input."""
        shape, memory = [num, *self._shape], self._there()
        return {name: (shape, memory.address(at, row)) for at, name in enumerate(self._names)}

    def clear(self, row: int, start: int, stop: int) -> None:
        """Zeros from one position of a row to another: a kernel multiplies by 0 what an earlier
        text left behind a row's end, which is no number for what was none."""
        if stop > start:
            self._there().clear(row, start, stop)

    def clear_all(self) -> None:
        """Zeros everywhere."""
        self._there().clear_all()

    def copy(self, source: int, target: int, stop: int, other: "Cache | None" = None) -> None:
        """The first positions of a row to another row, of which the rest stays.

        Args:
            other: the cache that has the source, on the same device; None: this one.
        """
        if (other is None and source == target) or stop == 0:
            return
        self._there().copy(source, target, stop, (other or self)._there())

    def wait(self) -> None:
        """Return when all that was begun is done."""
        self._there().wait()

    def release(self) -> None:
        """Give the memory up."""
        self._memory = None

    def _there(self) -> "_Memory":
        assert self._memory is not None, "it is not released"
        return self._memory


class _HostMemory:
    """[keys and values of all layers, rows, heads, length, size]; its pages are taken as they are
    written."""

    def __init__(
        self, graph: DecoderGraph, rows: int, length: int, whole: "_Memory | None" = None
    ) -> None:
        assert whole is None or isinstance(whole, _HostMemory), "of the same device"
        shape = (len(graph.present), rows, graph.heads, length, graph.head_size)
        if whole is None:
            self._array = np.zeros(shape, NUMPY_DTYPES[graph.cache_dtype])
        else:
            self._array = whole._array.reshape(-1)[: math.prod(shape)].reshape(shape)

    def address(self, at: int, row: int) -> int:
        strides = self._array.strides
        return int(self._array.ctypes.data + at * strides[0] + row * strides[1])

    def clear(self, row: int, start: int, stop: int) -> None:
        self._array[:, row, :, start:stop] = 0

    def clear_all(self) -> None:
        self._array[:] = 0

    def copy(self, source: int, target: int, stop: int, other: "_Memory") -> None:
        assert isinstance(other, _HostMemory), "of the same device"
        self._array[:, target, :, :stop] = other._array[:, source, :, :stop]

    def wait(self) -> None:
        """Nothing is begun that is not done."""


class _DeviceMemory:
    """The same on a device, where a text is cleared or copied in one call for all layers."""

    def __init__(
        self, graph: DecoderGraph, rows: int, length: int, whole: "_Memory | None" = None
    ) -> None:
        assert whole is None or isinstance(whole, _DeviceMemory), "of the same device"
        self._num, self._rows, self._heads = len(graph.present), rows, graph.heads
        self._line = graph.head_size * NUMPY_DTYPES[graph.cache_dtype].itemsize
        self._pitch = length * self._line
        """Bytes from a head to the next one."""
        self._cuda = CudaMemory(graph.device[1])
        self._is_busy = False
        lines = self._num * rows * graph.heads * length
        self._value: ort.OrtValue = (
            graph.allocate([lines, graph.head_size], graph.cache_dtype)
            if whole is None
            else whole._value
        )
        if whole is None:
            self.clear_all()

    def address(self, at: int, row: int) -> int:
        return int(self._value.data_ptr()) + (at * self._rows + row) * self._heads * self._pitch

    def clear(self, row: int, start: int, stop: int) -> None:
        if start == 0 and self._num * self._heads * self._pitch <= _WHOLE:
            stop = self._pitch // self._line
        pieces, width = self._pieces(row, start), (stop - start) * self._line
        self._is_busy = True
        self._cuda.zero(pieces, width, self._heads, self._num)

    def clear_all(self) -> None:
        self._is_busy = True
        self._cuda.zero(self._pieces(0), self._pitch, self._rows * self._heads, self._num)

    def copy(self, source: int, target: int, stop: int, other: "_Memory") -> None:
        assert isinstance(other, _DeviceMemory), "of the same device"
        places, width = (other._pieces(source), self._pieces(target)), stop * self._line
        self._is_busy = True
        self._cuda.copy(*places, width, self._heads, self._num)

    def wait(self) -> None:
        if self._is_busy:
            self._cuda.wait()
            self._is_busy = False

    def _pieces(self, row: int, start: int = 0) -> Pieces:
        """Those of a row: a block is its keys or values of a layer, a piece those of a head."""
        address = self.address(0, row) + start * self._line
        return Pieces(address, self._pitch, self._rows * self._heads)


_Memory = _HostMemory | _DeviceMemory
