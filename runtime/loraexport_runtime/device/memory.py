"""Arrays and tensors as OrtValues, on the host or on a device."""

from typing import Any

import numpy as np
import onnxruntime as ort

from ..errors import InputError
from .dtypes import ONNX_TYPES


def host_value(array: np.ndarray, dtype: str) -> ort.OrtValue:
    """An OrtValue over a contiguous numpy array, without a copy; bfloat16 through ml_dtypes."""
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(np.uint16), ONNX_TYPES[dtype]
        )
    return ort.OrtValue.ortvalue_from_numpy(array)


def device_value(tensor: Any, device: tuple[str, int], name: str) -> ort.OrtValue:
    """An OrtValue over a DLPack tensor (torch, cupy, jax), without a copy; an OrtValue as it is.

    Raises:
        InputError: it lives on another device than the session, or is not contiguous.
    """
    kind, index = tensor.__dlpack_device__()
    device_type = {1: "cpu", 2: "cuda"}.get(int(kind), f"DLPack device {int(kind)}")
    if (device_type, int(index)) != device:
        raise InputError(
            f"{name} is on {device_type}:{int(index)}, the session runs on {device[0]}:{device[1]};"
            " move one of them"
        )
    if isinstance(tensor, ort.OrtValue):
        return tensor
    # Stream 1 is CUDA's legacy default stream: the producer orders its pending work before it.
    try:
        capsule = tensor.__dlpack__(stream=1) if device_type == "cuda" else tensor.__dlpack__()
        return ort.OrtValue.from_dlpack(capsule)
    except (BufferError, RuntimeError) as error:  # BufferError: it requires a gradient
        raise InputError(
            f"{name}: onnxruntime cannot use this tensor without a copy: {error}. Pass a"
            " contiguous tensor that requires no gradient"
        ) from error


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of an array, a tensor or an OrtValue."""
    return tuple(tensor.shape() if isinstance(tensor, ort.OrtValue) else tensor.shape)


def dtype_of(tensor: Any) -> str:
    """The name of its dtype as numpy has it: `float32`, `bfloat16`, `int64`, …"""
    if isinstance(tensor, ort.OrtValue):
        name = tensor.data_type().removeprefix("tensor(").removesuffix(")")
        return {"float": "float32", "double": "float64"}.get(name, name)
    return str(tensor.dtype).removeprefix("torch.")


def host_view(tensor: Any) -> np.ndarray | None:
    """The values of a tensor in host memory, without a copy; None if it lives elsewhere."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if int(tensor.__dlpack_device__()[0]) != 1:
        return None
    return tensor.numpy() if isinstance(tensor, ort.OrtValue) else np.from_dlpack(tensor)
