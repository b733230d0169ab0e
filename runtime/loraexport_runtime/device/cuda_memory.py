"""Pieces of a device's memory with gaps between them, zeroed and copied by CUDA's runtime.

onnxruntime copies whole tensors only, each in a call that waits.
"""

import ctypes
from dataclasses import dataclass

from ..errors import ProviderError
from .cuda_libraries import open_cudart

_ON_DEVICE = 3
"""CUDA's number for a copy from the device to the device."""
_MOST_PITCH = (1 << 31) - 1
"""Bytes, of cudaMemset2D."""


class _Pitched(ctypes.Structure):
    """cudaPitchedPtr."""

    _fields_ = (
        ("address", ctypes.c_void_p),
        *((name, ctypes.c_size_t) for name in ("pitch", "xsize", "ysize")),
    )


class _Sizes(ctypes.Structure):
    """cudaExtent, and cudaPos."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in ("width", "height", "depth"))


class _Copy(ctypes.Structure):
    """cudaMemcpy3DParms, without arrays."""

    _fields_ = (
        ("source_array", ctypes.c_void_p),
        ("source_place", _Sizes),
        ("source", _Pitched),
        ("target_array", ctypes.c_void_p),
        ("target_place", _Sizes),
        ("target", _Pitched),
        ("sizes", _Sizes),
        ("kind", ctypes.c_int),
    )


@dataclass(frozen=True)
class Pieces:
    """Where pieces lie, so many in each of some blocks."""

    address: int
    pitch: int
    """Bytes from a piece to the next one."""
    stride: int
    """Pitches from a block to the next one."""

    def _pitched(self, width: int) -> _Pitched:
        return _Pitched(self.address, self.pitch, width, self.stride)


class CudaMemory:
    """A device's. What is begun is done after `wait`, behind which a run may come."""

    def __init__(self, index: int) -> None:
        self._index = index
        cudart = open_cudart()
        self._set_device, self._synchronize = cudart.cudaSetDevice, cudart.cudaStreamSynchronize
        self._zero, self._copy = cudart.cudaMemset3D, cudart.cudaMemcpy3D
        self._zero_blocks = cudart.cudaMemset2D

    def zero(self, place: Pieces, width: int, pieces: int, num: int) -> None:
        """Zeros in `width` bytes of each of so many pieces of so many blocks."""
        self._begin()
        stride = place.pitch * place.stride
        if width == place.pitch and stride <= _MOST_PITCH:
            # Pieces without gaps: one launch, where the other call has one for each block.
            sizes = map(ctypes.c_size_t, (width * pieces, num))
            address, step = ctypes.c_void_p(place.address), ctypes.c_size_t(stride)
            self._check(self._zero_blocks(address, step, 0, *sizes))
            return
        self._check(self._zero(place._pitched(width), 0, _Sizes(width, pieces, num)))

    def copy(self, source: Pieces, target: Pieces, width: int, pieces: int, num: int) -> None:
        """`width` bytes of each of so many pieces of so many blocks."""
        self._begin()
        places = source._pitched(width), target._pitched(width)
        copy = _Copy(source=places[0], target=places[1], kind=_ON_DEVICE)
        copy.sizes = _Sizes(width, pieces, num)
        self._check(self._copy(ctypes.byref(copy)))

    def wait(self) -> None:
        """Return when all is done."""
        self._begin()
        self._check(self._synchronize(None))

    def _begin(self) -> None:
        self._check(self._set_device(self._index))  # of this thread

    def _check(self, status: int) -> None:
        if status != 0:
            raise ProviderError(f"CUDA failed on device {self._index} with error {status}")
