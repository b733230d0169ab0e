"""What verifying layers and verifying whole models have in common."""

import platform
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from loraexport_runtime import ProviderError
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.providers import CPU, CUDA, normalise_providers, require_device

from ..spec.schema import Spec
from .report import Report, Row, Tolerance

CASES_FILE = "parity/cases.safetensors"


def slot_names(manifest: Manifest) -> dict[int, str]:
    """Adapter name by slot, for the adapters that start loaded."""
    return {entry.slot: entry.name for entry in manifest.adapters if entry.slot is not None}


def tolerance_of(spec: Spec, table: Mapping[str, Tolerance]) -> Tolerance:
    """The dtype's own, unless the spec sets the error that it allows."""
    tolerance = table[spec.export.dtype]
    if spec.parity.tolerance is None:
        return tolerance
    return replace(tolerance, error=spec.parity.tolerance)


def make_report(
    source: str,
    manifest: Manifest,
    tolerance: Tolerance,
    rows: Sequence[Row],
    skipped: dict[str, str],
    has_onnx: bool,
) -> Report:
    """The report of all rows; deferred, if there are ONNX graphs that nothing ran."""
    ran_onnx = any(row.implementation.startswith("onnx") for row in rows)
    return Report(
        source,
        manifest.dtype,
        tolerance.error,
        tuple(rows),
        skipped,
        environment(),
        deferred=has_onnx and not ran_onnx,
    )


def open_torchscript(path: Path, device: str) -> Any:
    """A TorchScript graph on a device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit announces its end
        return torch.jit.load(str(path)).to(device)  # type: ignore[no-untyped-call]


def open_plain_onnx(path: Path, provider: str = CPU) -> ort.InferenceSession:
    """A graph without the runtime: its own stacks, as any onnxruntime session has them."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=normalise_providers([provider]))


def open_graph(model: ir.Model) -> ort.InferenceSession:
    """A graph in memory, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:  # protobuf holds no more than 2 GiB
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        return open_plain_onnx(path)


def has_cuda() -> bool:
    """Whether onnxruntime's CUDA provider can run here."""
    try:
        normalise_providers([CUDA])
        require_device(("cuda", 0))
    except ProviderError:
        return False
    return True


def default_providers(manifest: Manifest) -> list[str]:
    """Every provider that can run an artifact here, the CPU first."""
    return [CPU] * (not manifest.needs_cuda) + [CUDA] * has_cuda()


def torch_devices(providers: Sequence[str]) -> list[str]:
    """Where torch's graphs follow onnxruntime's: the CPU always, CUDA if both can use it."""
    return ["cpu"] + (["cuda"] if CUDA in providers and torch.cuda.is_available() else [])


def environment() -> dict[str, str]:
    """What the figures depend on."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found
