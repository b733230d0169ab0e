"""Execution providers that really run, and buffers on their devices."""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort

from ..contract.manifest import Stack
from ..errors import InputError, ProviderError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_SHORT_NAMES = {"cpu": CPU, "cuda": CUDA}

Provider = str | tuple[str, dict[str, Any]]

NUMPY_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int64": np.dtype(np.int64),
}
# onnx.TensorProto.DataType, spelled out so that the runtime needs no onnx.
ONNX_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
_DLPACK_TYPES = {"float32": (2, 32), "float16": (2, 16), "bfloat16": (4, 16), "int64": (0, 64)}


def normalise_providers(providers: Sequence[Provider]) -> list[tuple[str, dict[str, Any]]]:
    """`["cuda"]` or onnxruntime's own names, with or without options, as (name, options)."""
    if isinstance(providers, str) or not providers:
        raise ProviderError(f"providers: expected a list such as ['{CPU}'], got {providers!r}")
    named = []
    for entry in providers:
        pair = entry if isinstance(entry, tuple) else (entry, {})
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], dict):
            raise ProviderError(
                f"providers: expected a name, or a tuple (name, options), got {entry!r}"
            )
        named.append((_SHORT_NAMES.get(pair[0], pair[0]), dict(pair[1])))
    for name, options in named:
        if name == CUDA:
            # onnxruntime would round float32 products to TF32, about 3 decimal digits.
            options.setdefault("use_tf32", "0")
        if name not in ort.get_available_providers():
            raise ProviderError(
                f"{name} is not part of this onnxruntime {ort.__version__} (it has"
                f" {', '.join(ort.get_available_providers())}); for CUDA install onnxruntime-gpu,"
                " and do not keep plain onnxruntime beside it"
            )
    return named


def session_device(provider: tuple[str, dict[str, Any]]) -> tuple[str, int]:
    """Where a session of this first provider keeps its buffers, as ("cuda", 1) or ("cpu", 0)."""
    name, options = provider
    return ("cuda", int(options.get("device_id", 0))) if name == CUDA else ("cpu", 0)


def check_cuda_graphs(providers: Sequence[tuple[str, dict[str, Any]]], cuda_graphs: bool) -> None:
    """Raise ProviderError unless sessions of these providers capture graphs as they are told to."""
    if cuda_graphs and providers[0][0] != CUDA:
        raise ProviderError(
            f"CUDA graphs were asked for on {providers[0][0]}; pass providers=['cuda'], or no"
            " cuda_graphs"
        )
    given = [str(options.get("enable_cuda_graph", "0")) for _, options in providers]
    if not cuda_graphs and not set(given) <= {"0", "False"}:
        raise ProviderError(
            "enable_cuda_graph alone would replay one batch's graph for all others; pass"
            " cuda_graphs=True instead, and warm_up the sizes of your batches"
        )


def with_cuda_graphs(
    providers: Sequence[tuple[str, dict[str, Any]]],
) -> list[tuple[str, dict[str, Any]]]:
    """The same providers, where CUDA may capture: a run says whether, by its `gpu_graph_id`."""
    return [
        (name, {**options, "enable_cuda_graph": "1"} if name == CUDA else options)
        for name, options in providers
    ]


def graph_options(graph_id: int) -> ort.RunOptions:
    """For a run of a session that may capture: replay, or capture, this graph; -1: neither."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(graph_id))
    return options


def require_device(device: tuple[str, int]) -> None:
    """Raise ProviderError unless memory can be had on a device; names what is missing."""
    if device[0] == "cpu":
        return
    with _quiet():
        with redirect_stdout(StringIO()):  # it prints what it does not find
            ort.preload_dlls()  # the CUDA libraries that pip packages bring
        try:
            ort.OrtValue.ortvalue_from_shape_and_type([1], ONNX_TYPES["float32"], *device)
        except Exception as error:
            raise ProviderError(_missing(CUDA, str(error))) from error


def open_session(
    path: Path,
    providers: list[tuple[str, dict[str, Any]]],
    initializers: Mapping[str, ort.OrtValue],
    threads: int | None,
    tail: bytes = b"",
) -> ort.InferenceSession:
    """An InferenceSession that runs on the providers asked for, over the caller's initializers.

    The initializers replace the graph's own of that name without a copy: what is written into
    them later is seen by the next run. The tail is protobuf that follows that of the file.

    Raises:
        ProviderError: a provider cannot run here. onnxruntime alone falls back to the CPU.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its warning that stacks are overridable is what we want
    if threads is not None:
        options.intra_op_num_threads = threads
    for name, value in initializers.items():
        options.add_initializer(name, value)
    names = [name for name, _ in providers]
    try:
        graph: Path | bytes = path
        if tail:
            options.add_session_config_entry(
                "session.model_external_initializers_file_folder_path", str(path.parent)
            )
            graph = path.read_bytes() + tail
        with _quiet():
            session = ort.InferenceSession(graph, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise ProviderError(
            f"{path}: onnxruntime {ort.__version__} cannot open this graph on"
            f" {', '.join(names)}: {error}"
        ) from error
    for name in names:
        if name not in session.get_providers():
            raise ProviderError(_missing(name, "its libraries load, but it was not used"))
    return session


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnxruntime from printing the failure that an exception is about to tell."""
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)


def _missing(provider: str, fallback_reason: str) -> str:
    library = f"libonnxruntime_providers_{provider.removesuffix('ExecutionProvider').lower()}.so"
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / library))
        reason = fallback_reason
    except OSError as error:
        reason = str(error)
    return (
        f"{provider} was asked for but cannot run here: {reason}. Install what is missing"
        f" (onnxruntime {ort.__version__} needs CUDA 13 and cuDNN 9), or pass providers=['{CPU}']"
    )


class StackBuffer:
    """A stack's memory on the session's device. Slots are written in place, without a copy."""

    def __init__(self, stack: Stack, initial: np.ndarray, dtype: str, device: tuple[str, int]):
        self.stack = stack
        self._dtype = dtype
        self._memory = ort.OrtValue.ortvalue_from_shape_and_type(
            list(stack.shape), ONNX_TYPES[dtype], *device
        )
        # onnxruntime takes only memory that an OrtValue does not own as an initializer.
        self.value = self._view(slice(0, stack.shape[0]))
        self.value.update_inplace(host_value(initial, dtype))

    def write(self, slot: int, block: np.ndarray) -> None:
        """Overwrite the rows of one slot."""
        view = self._view(self.stack.rows(slot))
        view.update_inplace(host_value(np.ascontiguousarray(block), self._dtype))

    def _view(self, rows: slice) -> ort.OrtValue:
        return rows_view(self._memory, rows, self.stack.shape[1], self._dtype)


def host_value(array: np.ndarray, dtype: str) -> ort.OrtValue:
    """An OrtValue over a contiguous numpy array, without a copy; bfloat16 through ml_dtypes."""
    if dtype == "bfloat16":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
            array.view(np.uint16), ONNX_TYPES[dtype]
        )
    return ort.OrtValue.ortvalue_from_numpy(array)


def device_value(tensor: Any, device: tuple[str, int], name: str) -> ort.OrtValue:
    """An OrtValue over a DLPack tensor (torch, cupy, jax), without a copy.

    Raises:
        InputError: it lives on another device than the session, or is not contiguous.
    """
    kind, index = tensor.__dlpack_device__()
    found = {1: "cpu", 2: "cuda"}.get(int(kind), f"DLPack device {int(kind)}")
    if (found, int(index)) != device:
        raise InputError(
            f"{name} is on {found}:{int(index)}, the session runs on {device[0]}:{device[1]};"
            " move one of them"
        )
    # Stream 1 is CUDA's legacy default stream: the producer orders its pending work before it.
    try:
        capsule = tensor.__dlpack__(stream=1) if found == "cuda" else tensor.__dlpack__()
        return ort.OrtValue.from_dlpack(capsule)
    except (BufferError, RuntimeError) as error:  # BufferError: it requires a gradient
        raise InputError(
            f"{name}: onnxruntime cannot use this tensor without a copy: {error}. Pass a"
            " contiguous tensor that requires no gradient"
        ) from error


def host_view(tensor: Any) -> np.ndarray | None:
    """The values of a tensor in host memory, without a copy; None if it lives elsewhere."""
    if isinstance(tensor, np.ndarray):
        return tensor
    if int(tensor.__dlpack_device__()[0]) != 1:
        return None
    return tensor.numpy() if isinstance(tensor, ort.OrtValue) else np.from_dlpack(tensor)


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManagedTensor(ctypes.Structure):
    """DLPack's own struct, and behind it the shape that it points to."""

    _fields_ = (
        ("tensor", _DLTensor),
        ("manager_context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * 2),
    )


def rows_view(value: ort.OrtValue, rows: slice, width: int, dtype: str) -> ort.OrtValue:
    """Some rows of a matrix as an OrtValue that does not own its memory; keep `value` alive.

    The DLPack struct is malloc's and its deleter is free, so its life ends with the last OrtValue
    that uses it, whatever Python has collected before.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    address = libc.malloc(ctypes.sizeof(_DLManagedTensor))
    code, bits = _DLPACK_TYPES[dtype]
    device_type, device_id = map(int, value.__dlpack_device__())
    managed = _DLManagedTensor.from_address(address)
    managed.shape[:] = rows.stop - rows.start, width
    managed.manager_context = None
    managed.deleter = ctypes.cast(libc.free, ctypes.c_void_p).value
    managed.tensor = _DLTensor(
        data=value.data_ptr() + rows.start * width * bits // 8,
        device_type=device_type,
        device_id=device_id,
        ndim=2,
        code=code,
        bits=bits,
        lanes=1,
        shape=address + _DLManagedTensor.shape.offset,
    )
    make_capsule = ctypes.pythonapi.PyCapsule_New
    make_capsule.restype = ctypes.py_object
    make_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return ort.OrtValue.from_dlpack(make_capsule(address, b"dltensor", None))
