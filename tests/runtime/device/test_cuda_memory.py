"""Pieces of memory, zeroed and copied over a stand-in for CUDA's runtime that works on the host."""

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loraexport_runtime.device import cuda_memory
from loraexport_runtime.device.cuda_memory import CudaMemory, Pieces
from loraexport_runtime.errors import ProviderError

SHAPE = (3, 4, 2, 8, 5)
"""Blocks (keys and values of all layers), rows, pieces (heads), length, size."""


def _places(pitched: Any, sizes: Any) -> list[int]:
    starts = [
        block * pitched.ysize + piece
        for block in range(sizes.depth)
        for piece in range(sizes.height)
    ]
    return [pitched.address + start * pitched.pitch for start in starts]


def _zero(pitched: Any, value: int, sizes: Any) -> int:
    for place in _places(pitched, sizes):
        ctypes.memset(place, value, sizes.width)
    return 0


def _zero_blocks(address: Any, pitch: Any, value: int, width: Any, num: Any) -> int:
    for block in range(num.value):
        ctypes.memset(address.value + block * pitch.value, value, width.value)
    return 0


def _copy(reference: Any) -> int:
    copy = reference._obj
    assert (copy.source_array, copy.target_array, copy.kind) == (None, None, 3)
    places = zip(_places(copy.target, copy.sizes), _places(copy.source, copy.sizes), strict=True)
    for target, source in places:
        ctypes.memmove(target, source, copy.sizes.width)
    return 0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> CudaMemory:
    library = SimpleNamespace(
        cudaSetDevice=lambda index: index,
        cudaStreamSynchronize=lambda stream: 0,
        cudaMemset3D=_zero,
        cudaMemset2D=_zero_blocks,
        cudaMemcpy3D=_copy,
    )
    monkeypatch.setattr(cuda_memory, "open_cudart", lambda: library)
    return CudaMemory(0)


def _of(array: np.ndarray, row: int, start: int) -> Pieces:
    address = array.ctypes.data + row * array.strides[1] + start * array.strides[3]
    return Pieces(address, array.strides[2], array.shape[1] * array.shape[2])


def test_a_row_of_all_blocks_is_zeroed(memory: CudaMemory) -> None:
    array = np.arange(1, 1 + np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    expected = array.copy()
    expected[:, 2, :, 3:7] = 0
    memory.zero(_of(array, 2, 3), 4 * array.strides[3], 2, 3)
    memory.wait()
    assert np.array_equal(array, expected)


def test_a_whole_row_of_all_blocks_is_zeroed(
    memory: CudaMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one launch, where the gaps are not too large for it."""
    for most in (cuda_memory._MOST_PITCH, 8):
        monkeypatch.setattr(cuda_memory, "_MOST_PITCH", most)
        array = np.arange(1, 1 + np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
        expected = array.copy()
        expected[:, 2] = 0
        memory.zero(_of(array, 2, 0), array.strides[2], 2, 3)
        assert np.array_equal(array, expected)


def test_a_row_is_copied_from_memory_of_another_size(memory: CudaMemory) -> None:
    source = np.arange(1, 1 + 3 * 1 * 2 * 6 * 5, dtype=np.float16).reshape(3, 1, 2, 6, 5)
    target = np.zeros(SHAPE, np.float16)
    expected = target.copy()
    expected[:, 1, :, :4] = source[:, 0, :, :4]
    memory.copy(_of(source, 0, 0), _of(target, 1, 0), 4 * source.strides[3], 2, 3)
    assert np.array_equal(target, expected)


def test_an_error_of_cuda_is_told(memory: CudaMemory) -> None:
    memory._index = 7
    with pytest.raises(ProviderError, match="CUDA failed on device 7 with error 7"):
        memory.wait()
