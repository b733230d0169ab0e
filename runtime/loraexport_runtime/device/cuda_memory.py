"""Pieces of a device's memory with gaps between them, zeroed and copied by CUDA's runtime.

onnxruntime copies whole tensors only, each in a call that waits.
"""

import ctypes

from ..errors import ProviderError
from .cuda_libraries import open_cudart

_ON_DEVICE = 3
"""CUDA's number for a copy from the device to the device."""


class CudaMemory:
    """A device's. What is begun is done after `wait`, behind which a run may come."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._cudart = open_cudart()

    def zero(self, address: int, pitch: int, width: int, pieces: int) -> None:
        """Zeros in `width` bytes of each of so many pieces, which begin `pitch` bytes apart."""
        self._begin()
        place, size = ctypes.c_void_p(address), (ctypes.c_size_t(width), ctypes.c_size_t(pieces))
        self._check(self._cudart.cudaMemset2D(place, ctypes.c_size_t(pitch), 0, *size))

    def copy(
        self, source: tuple[int, int], target: tuple[int, int], width: int, pieces: int
    ) -> None:
        """`width` bytes of each of so many pieces; both places: (address, pitch)."""
        self._begin()
        places = [
            part
            for address, pitch in (target, source)
            for part in (ctypes.c_void_p(address), ctypes.c_size_t(pitch))
        ]
        size = ctypes.c_size_t(width), ctypes.c_size_t(pieces)
        self._check(self._cudart.cudaMemcpy2D(*places, *size, _ON_DEVICE))

    def wait(self) -> None:
        """Return when all is done."""
        self._begin()
        self._check(self._cudart.cudaStreamSynchronize(None))

    def _begin(self) -> None:
        self._check(self._cudart.cudaSetDevice(self._index))  # of this thread

    def _check(self, status: int) -> None:
        if status != 0:
            raise ProviderError(f"CUDA failed on device {self._index} with error {status}")
