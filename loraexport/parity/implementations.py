"""What verifying layers and verifying whole models have in common."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraexport_runtime.checking.check import why_no_cuda
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import CPU, CUDA

NO_BASE = "the base is not here"
"""Why what needs the base cannot run."""
NOT_ASKED = "the spec does not ask for it"
NO_TORCHSCRIPT = "it is code that the artifact brings; where you trust it, add --torchscript"
"""Why the TorchScript of an artifact from elsewhere is not run."""


def open_torchscript(path: Path, device: str) -> Any:
    """A TorchScript graph on a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit announces its end
        return torch.jit.load(str(path)).to(device)  # type: ignore[no-untyped-call]


def has_cuda() -> bool:
    """Whether onnxruntime's CUDA provider can run here."""
    return why_no_cuda() is None


def default_providers(manifest: Manifest) -> list[str]:
    """Every provider that can run an artifact here, the CPU first."""
    return [CPU] * (not manifest.needs_cuda) + [CUDA] * has_cuda()


def torch_devices(providers: Sequence[str]) -> list[str]:
    """Where torch's graphs follow onnxruntime's: the CPU always, CUDA if both can use it."""
    return ["cpu"] + (["cuda"] if CUDA in providers and torch.cuda.is_available() else [])
