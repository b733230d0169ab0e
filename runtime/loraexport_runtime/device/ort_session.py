"""An onnxruntime session on the device that was asked for, or an error that says why not."""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort

from ..errors import ArtifactError, ProviderError
from .captures import using
from .cuda_libraries import load_cuda_libraries, missing_device, missing_library
from .dtypes import ONNX_TYPES
from .providers import CPU, CUDA, session_device

_FATAL = 4
"""onnxruntime's severity above errors: each of those is an exception as well, which tells it."""


def require_device(device: tuple[str, int]) -> None:
    """Raise ProviderError unless memory can be had on a device; names what is missing."""
    if device[0] == "cpu":
        return
    load_cuda_libraries()
    if reason := missing_library() or missing_device(device[1]):
        raise ProviderError(_cannot_run(CUDA, reason))
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], ONNX_TYPES["float32"], *device)
    except Exception as error:
        raise ProviderError(_missing(CUDA, str(error))) from error


def quiet_options(threads: int | None = None) -> ort.SessionOptions:
    """Options of a session that logs nothing of its own; the severity of all others stays.

    Args:
        threads: onnxruntime's intra-op threads; None: its own choice.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def open_session(
    path: Path,
    providers: list[tuple[str, dict[str, Any]]],
    initializers: Mapping[str, ort.OrtValue],
    threads: int | None,
    library: Path | None = None,
) -> ort.InferenceSession:
    """An InferenceSession that runs on the providers asked for, over the caller's initializers.

    The initializers replace the graph's own of that name without a copy: what is written into
    them later is seen by the next run.

    Args:
        library: of kernels, to register (see kernels.py).

    Raises:
        ProviderError: a provider cannot run here. onnxruntime alone falls back to the CPU.
        ArtifactError: the graph has no such initializer to override, which onnxruntime ignores.
    """
    options = quiet_options(threads)
    for name, value in initializers.items():
        options.add_initializer(name, value)
    if library is not None:
        _register(options, library)
    names = [name for name, _ in providers]
    try:
        with using(session_device(providers[0])):
            session = ort.InferenceSession(path, options, providers=providers, enable_fallback=0)
    except Exception as error:
        raise ProviderError(
            f"{path}: onnxruntime {ort.__version__} cannot open this graph on"
            f" {', '.join(names)}: {error}"
        ) from error
    for name in names:
        if name not in session.get_providers():
            raise ProviderError(_missing(name, "its libraries load, but it was not used"))
    overridable = {entry.name: entry for entry in session.get_overridable_initializers()}
    for name, value in initializers.items():
        if (
            name not in overridable
            or overridable[name].shape != value.shape()
            or overridable[name].type != value.data_type()
        ):
            raise ArtifactError(
                f"{path}: it has no initializer {name!r} of {value.shape()}, which the manifest"
                " says, so that loaded adapters would have no effect; build the artifact again"
            )
    return session


def _register(options: ort.SessionOptions, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise ProviderError(
            f"{library}: onnxruntime {ort.__version__} cannot take these kernels: {error}. Install"
            " loraexport-kernels again, or pass kernels=False"
        ) from error


def _missing(provider: str, fallback_reason: str) -> str:
    library = f"libonnxruntime_providers_{provider.removesuffix('ExecutionProvider').lower()}.so"
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / library))
        reason = fallback_reason
    except OSError as error:
        reason = str(error)
    return _cannot_run(provider, reason)


def _cannot_run(provider: str, reason: str) -> str:
    return (
        f"{provider} was asked for but cannot run here: {reason}. Install what is missing"
        f" (onnxruntime {ort.__version__} needs CUDA 13 and cuDNN 9), or pass providers=['{CPU}']"
    )
