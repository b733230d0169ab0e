"""CUDA's libraries, loaded without a word ahead of onnxruntime, or the name of the missing one.

onnxruntime prints what it does not find, and logs it through the one logger of the process. So
what it needs is tried here first, and it is asked only where nothing is missing.
"""

import ctypes
import importlib.util
from pathlib import Path

import onnxruntime as ort

_DEFAULT_CUDA = 13
"""Of a build that does not say for which CUDA it was made."""


def load_cuda_libraries() -> None:
    """Load the libraries that pip packages bring; those of the system are found without this.

    A library that is loaded answers for its name from then on, wherever it lies.
    """
    for name in (*_needed(), *_optional()):
        for folder in _package_folders():
            for path in sorted(folder.glob(f"*/lib/{name}")):
                try:
                    ctypes.CDLL(str(path))
                except OSError:  # what it lacks is told by `missing_library`, if it is needed
                    continue


def missing_library() -> str | None:
    """Why one of the libraries that the CUDA provider cannot do without does not load."""
    for name in (*_needed(), "libcuda.so.1"):  # the last one comes with the driver
        try:
            ctypes.CDLL(name)
        except OSError as error:
            return str(error)
    return None


def open_cudart() -> ctypes.CDLL:
    """CUDA's runtime; call it once no library is missing."""
    return ctypes.CDLL(f"libcudart.so.{_cuda_major()}")


def missing_device(index: int) -> str | None:
    """Why a device cannot be used; call it once no library is missing."""
    count = ctypes.c_int(0)
    status = open_cudart().cudaGetDeviceCount(ctypes.byref(count))
    if status != 0:
        return f"CUDA finds no device (error {status} of cudaGetDeviceCount)"
    if index >= count.value:
        return f"there is no device {index}; CUDA finds {count.value}, counted from 0"
    return None


def free_memory(index: int) -> int:
    """Bytes that a device has free now; call it once the device is known to be there."""
    cudart = open_cudart()
    free, total, before = ctypes.c_size_t(0), ctypes.c_size_t(0), ctypes.c_int(0)
    cudart.cudaGetDevice(ctypes.byref(before))
    cudart.cudaSetDevice(index)
    status = cudart.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    cudart.cudaSetDevice(before)
    return free.value if status == 0 else 0


def compute_capability(index: int) -> tuple[int, int]:
    """Of a device, (9, 0) for instance; call it once the device is known to be there."""
    cudart = ctypes.CDLL(f"libcudart.so.{_cuda_major()}")
    numbers = []
    for attribute in (75, 76):  # cudaDevAttrComputeCapabilityMajor and Minor
        number = ctypes.c_int(0)
        cudart.cudaDeviceGetAttribute(ctypes.byref(number), attribute, index)
        numbers.append(number.value)
    return numbers[0], numbers[1]


def _needed() -> tuple[str, ...]:
    """In this order: each one needs those before it."""
    major = _cuda_major()
    cublas = (f"libcublasLt.so.{major}", f"libcublas.so.{major}")
    return (*cublas, "libcurand.so.10", f"libcudart.so.{major}")


def _optional() -> tuple[str, ...]:
    major = _cuda_major()
    cufft = 12 if major >= 13 else 11
    return f"libnvrtc.so.{major}", f"libcufft.so.{cufft}", "libcudnn.so.9"


def _cuda_major() -> int:
    major = str(getattr(ort, "cuda_version", "")).partition(".")[0]
    return int(major) if major.isdigit() else _DEFAULT_CUDA


def _package_folders() -> list[Path]:
    """Where the pip packages nvidia-… lie, each with its libraries in a folder `lib`."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
