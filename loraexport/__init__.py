"""loraexport: one YAML spec and one command give multi-LoRA graphs for stock onnxruntime.

`build`, `make_plan` and `verify` are the commands of those names as functions. They import torch
when they are called; importing this module does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from loraexport_runtime.errors import (
    AdapterError,
    ArtifactError,
    BatchError,
    LoraexportError,
    ProviderError,
    WeightsError,
)

from .errors import (
    BaseModelError,
    BuildBusyError,
    DiskFullError,
    ExportError,
    ParityError,
    SpecError,
    UsageError,
)
from .version import __version__

if TYPE_CHECKING:  # parity imports torch
    from .parity.report import Report
    from .plan.plan import AnyPlan

__all__ = [
    "AdapterError",
    "ArtifactError",
    "BaseModelError",
    "BatchError",
    "BuildBusyError",
    "BuildResult",
    "DiskFullError",
    "ExportError",
    "LoraexportError",
    "ParityError",
    "ProviderError",
    "SpecError",
    "UsageError",
    "VerifyResult",
    "WeightsError",
    "__version__",
    "build",
    "make_plan",
    "verify",
]


@dataclass(frozen=True)
class BuildResult:
    """What a build published."""

    folder: Path
    """The artifact: `out/<name>`."""
    report: "Report"
    """What parity found; `report.status` is `passed`, or `deferred` where the spec allows it."""


@dataclass(frozen=True)
class VerifyResult:
    """What repeating an artifact's proof found."""

    folder: Path
    report: "Report"
    """Every comparison; `report.status` is `failed` if one of them is in `report.failures`."""
    published: bool
    """Whether the artifact was unverified until now, and is verified by this."""


def build(
    spec: str | PathLike[str],
    out: str | PathLike[str] = "artifacts",
    progress: Callable[[str], None] = lambda stage: None,
) -> BuildResult:
    """Export, prove and publish the artifact of a spec.

    Args:
        spec: the YAML file.
        out: the folder that holds the artifacts, made if it is not there.
        progress: called with the name of every stage when it begins.

    Raises:
        SpecError: the spec breaks its contract.
        BaseModelError, AdapterError, WeightsError: the base or an adapter cannot be used.
        ParityError: a graph disagrees with the reference; nothing is published.
        BuildBusyError, UsageError: another build holds the artifact, or `out` cannot be written.
        DiskFullError: there is no room for what is written.
        ExportError: torch or onnx failed on a graph.
    """
    from .pipeline.build import build as run_build

    folder, report = run_build(Path(spec), Path(out), progress)
    return BuildResult(folder, report)


def make_plan(
    spec: str | PathLike[str],
    *,
    progress: Callable[[str], None] = lambda stage: None,
) -> "AnyPlan":
    """Plan a build: sites, ranks, slots, strategies and costs, without reading weights.

    Args:
        spec: the YAML file.
        progress: called with the name of every stage when it begins.

    Raises:
        SpecError: the spec breaks its contract.
        BaseModelError, AdapterError, WeightsError: the base or an adapter cannot be used.
    """
    from .plan.plan import make_plan as plan_spec
    from .spec.reader import read_spec

    path = Path(spec)
    progress("read the spec")
    parsed = read_spec(path)
    progress("plan")
    return plan_spec(parsed, path.parent)


def verify(
    artifact: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    providers: Sequence[str] | None = None,
    torchscript: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> VerifyResult:
    """Repeat an artifact's proof, perhaps on another machine.

    An artifact that was published unverified (`parity: {onnx: deferred}`) is verified by a proof
    that passes.

    Args:
        artifact: its folder.
        base: the base's directory; default: where the spec says, else the stored cases.
        providers: `cpu`, `cuda` or both; default: what runs here.
        torchscript: run its TorchScript too, which is code that the artifact brings; without,
            `report.skipped` names it.
        progress: called with the name of every stage when it begins.

    Raises:
        ArtifactError: the artifact is damaged, or holds no spec.
        BaseModelError: `base` is not the artifact's.
        ProviderError: a provider cannot run here.
        UsageError: `base` was given for a base that a seed makes, the artifact has TorchScript
            alone and `torchscript` is False, or a build replaced the artifact meanwhile.
    """
    from loraexport_runtime.contract.manifest import Manifest

    from .artifact import mark_verified
    from .pipeline.verify import verify_artifact

    folder = Path(artifact)
    progress("run every implementation")
    manifest = Manifest.read(folder)
    directory = None if base is None else Path(base)
    report = verify_artifact(folder, manifest, directory, providers, torchscript)
    published = manifest.parity.status == "deferred" and report.status == "passed"
    if published:
        mark_verified(folder, manifest, report.summary())
    return VerifyResult(folder, report, published)
