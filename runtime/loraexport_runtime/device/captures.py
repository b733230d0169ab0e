"""Work on a device while another thread captures a CUDA graph.

onnxruntime captures in CUDA's global mode: until that ends, CUDA refuses copies that wait and new
memory to every thread of the process, and whoever asks for them spoils the capture too. It leaves
threads alone that are in its relaxed mode.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from .cuda_libraries import open_cudart

_RELAXED = 2
"""cudaStreamCaptureModeRelaxed."""
_cudart = cache(open_cudart)


@contextmanager
def beside_captures(device: tuple[str, int]) -> Iterator[None]:
    """Let what this thread does on a device, which is known to be there, stand beside captures.

    It has its own mode again afterwards: the thread may be somebody else's.
    """
    if device[0] == "cpu":
        yield
        return
    before = _exchange(_RELAXED)
    try:
        yield
    finally:
        _exchange(before)


def stay_beside_captures(device: tuple[str, int]) -> None:
    """The same for all that a thread of our own does from here on."""
    if device[0] != "cpu":
        _exchange(_RELAXED)


def _exchange(mode: int) -> int:
    """Give this thread a mode; the one that it had."""
    value = ctypes.c_int(mode)
    _cudart().cudaThreadExchangeStreamCaptureMode(ctypes.byref(value))
    return value.value
