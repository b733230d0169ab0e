"""One run of a graph over bound buffers: numpy in and out, or device tensors without a copy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort

from .captures import using
from .dtypes import NUMPY_DTYPES, ONNX_TYPES
from .memory import device_value, host_value


def run_bound(
    session: ort.InferenceSession,
    tensors: Mapping[str, tuple[Any, str]],
    control: Mapping[str, np.ndarray],
    outputs: Mapping[str, tuple[list[int], str]],
    device: tuple[str, int],
    options: ort.RunOptions | None = None,
) -> dict[str, Any]:
    """Run a graph and give its outputs by name.

    Args:
        tensors: name -> (numpy array or DLPack tensor on `device`, dtype); all of one of the two.
        control: arrays on the host: segments, adapter ids and weights.
        outputs: name -> (shape, dtype).

    Returns:
        numpy arrays for numpy inputs, else `onnxruntime.OrtValue`s on the device.
    """
    with using(device):
        binding = session.io_binding()
        on_host = all(isinstance(tensor, np.ndarray) for tensor, _ in tensors.values())
        alive: list[Any] = []  # bound memory must outlive the run
        for name, (tensor, dtype) in tensors.items():
            if on_host:
                alive.append(np.ascontiguousarray(tensor))
                binding.bind_ortvalue_input(name, host_value(alive[-1], dtype))
            else:
                alive.append(device_value(tensor, device, name))
                binding.bind_ortvalue_input(name, alive[-1])
        for name, array in control.items():
            alive.append(np.ascontiguousarray(array))
            # As an OrtValue: a numpy array is not taken for an input that need not be fed.
            binding.bind_ortvalue_input(name, host_value(alive[-1], str(array.dtype)))
        results = {}
        for name, (shape, dtype) in outputs.items():
            results[name] = empty_output(shape, dtype, on_host, device)
            if on_host:
                address = results[name].ctypes.data
                binding.bind_output(name, "cpu", 0, ONNX_TYPES[dtype], shape, address)
            else:
                binding.bind_ortvalue_output(name, results[name])
        if not on_host:
            binding.synchronize_inputs()
        session.run_with_iobinding(binding, options)
        return results


def empty_output(shape: list[int], dtype: str, on_host: bool, device: tuple[str, int]) -> Any:
    """Memory for an output: a numpy array, or an OrtValue on the device."""
    if on_host:
        return np.empty(shape, NUMPY_DTYPES[dtype])
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, ONNX_TYPES[dtype], *device)
