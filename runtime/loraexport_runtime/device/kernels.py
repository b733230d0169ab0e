"""Whether a session takes the kernels of loraexport-kernels, a library for onnxruntime.

It comes from the installed package alone: no artifact brings one or names one. Without it
onnxruntime puts the stock operators that are a function's body in the place of its calls.
"""

import importlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..contract.manifest import Manifest
from ..errors import InputError, ProviderError
from .cuda_libraries import compute_capability
from .providers import session_device

_LOG = logging.getLogger(__name__)
_PACKAGE, _DISTRIBUTION = "loraexport_kernels", "loraexport-kernels"
_CUDA_DTYPES = ("float16", "bfloat16")

Kernels = Literal["auto"] | bool
"""auto: on CUDA, where they can and are proven for the artifact; True: an error says why they
cannot; False: stock operators."""


@dataclass(frozen=True)
class KernelChoice:
    """What computes the sites of a session."""

    library: Path | None
    """To register; None: stock operators."""
    said: str


STOCK = KernelChoice(None, "stock operators")


def choose_kernels(
    asked: Kernels, manifest: Manifest, providers: Sequence[tuple[str, dict[str, Any]]]
) -> KernelChoice:
    """The kernels, or stock operators and why, for a device that is known to be there.

    It is logged of an artifact whose graphs call functions.

    Raises:
        ProviderError: they were asked for, and what is missing.
        InputError: `asked` is none of the three.
    """
    if asked not in ("auto", True, False) or not isinstance(asked, bool | str):
        raise InputError(f"kernels is {asked!r}; expected 'auto', True or False")
    device = session_device(providers[0])
    if asked is False:
        why: str | None = "kernels=False"
    elif asked == "auto" and device[0] == "cpu":
        why = "on a CPU kernels are taken by kernels=True alone"
    else:
        why = why_no_kernels(manifest, device)
    if why is None and asked == "auto" and not _is_proven(manifest, device[0]):
        why = (
            "its proof did not run with kernels on CUDA; build it where they are, or pass"
            " kernels=True once `check` has passed here"
        )
    if why is None:
        choice = _take(manifest, device[0])
    elif asked is True:
        raise ProviderError(f"kernels=True, but {why}; or pass kernels=False, for stock operators")
    else:
        choice = KernelChoice(None, f"{STOCK.said}: {why}")
    if manifest.functions:
        _LOG.info("the sites of %s run on %s", manifest.name, choice.said)
    return choice


def why_no_kernels(manifest: Manifest, device: tuple[str, int]) -> str | None:
    """What keeps the kernels from computing an artifact on a device; None: nothing."""
    if not manifest.functions:
        return (
            "no graph of this artifact calls their functions; add export: {kernels: true} to the"
            " spec and build again"
        )
    return why_no_library(manifest.dtype, device)


def why_no_library(dtype: str, device: tuple[str, int]) -> str | None:
    """What keeps the kernels from computing graphs of a dtype that call their functions."""
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"{_DISTRIBUTION} is not installed; pip install ./runtime/kernels"
    try:
        kernel_library()
    except Exception as error:  # whatever its modules raise
        return f"{_DISTRIBUTION} is damaged: {error}; install it again"
    if device[0] == "cpu":
        return None
    if dtype not in _CUDA_DTYPES:
        return f"on CUDA they are of {' and '.join(_CUDA_DTYPES)}, and this is {dtype}"
    capability = compute_capability(device[1])
    if not importlib.import_module(_PACKAGE).supported(capability):
        major, minor = capability
        return f"they do not support this device, of compute capability {major}.{minor}"
    return None


def _is_proven(manifest: Manifest, device: str) -> bool:
    return f"onnx-{device}-kernels" in manifest.parity.checked


def _take(manifest: Manifest, device: str) -> KernelChoice:
    version = getattr(importlib.import_module(_PACKAGE), "__version__", "of no version")
    is_proven = _is_proven(manifest, device)
    proof = "proven in its build" if is_proven else "not proven in its build: see check"
    return KernelChoice(kernel_library(), f"{_DISTRIBUTION} {version}, {proof}")


def kernel_library() -> Path:
    """Of the installed package, which is there where `why_no_library` has nothing to say."""
    return Path(importlib.import_module(_PACKAGE).library_path())
