"""A published artifact -> what its stored cases give on this machine, without torch."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..contract.artifact import open_artifact
from ..contract.files import MANIFEST_FILE, digest_file
from ..contract.kinds import Decoder, Graph, Layers, Model
from ..contract.manifest import Manifest, ParityStatus
from ..device.ort_session import require_device
from ..device.providers import CPU, CUDA, normalise_providers
from ..errors import ProviderError
from . import decoder, layers, model
from .rows import LAYER_TOLERANCES, MODEL_TOLERANCES, Comparison, label_of, stored_tolerance


@dataclass(frozen=True)
class CheckReport:
    """All rows of one artifact on one machine."""

    artifact: str
    digest: str
    """sha256 of the manifest.json that was read."""
    parity: ParityStatus
    """What the manifest says of the build."""
    tolerance: float
    gain_tolerance: float
    rows: tuple[Comparison, ...]
    skipped: dict[str, str]
    """What was not run here -> why."""

    @property
    def failures(self) -> tuple[Comparison, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @property
    def status(self) -> Literal["passed", "failed"]:
        return "failed" if self.failures or self.parity == "failed" else "passed"

    def to_json(self) -> str:
        data = {"status": self.status, **dataclasses.asdict(self)}
        return json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n"


def check_artifact(
    path: str | Path, providers: Sequence[str] | None = None, digest: str | None = None
) -> CheckReport:
    """Run every stored case of an artifact in sessions of its own, and hold it to the reference.

    An artifact whose parity is deferred or failed is opened too; the report says so.

    Args:
        providers: `"cpu"`, `"cuda"` or onnxruntime's names, a run on each; default: every one that
            can run the artifact here.
        digest: the sha256 that manifest.json must have; default: any.

    Raises:
        ArtifactError: a file is missing or damaged, or it is not the artifact of the digest.
        ProviderError: a provider cannot run here, or none can.
    """
    folder = Path(path)

    def run(manifest: Manifest) -> CheckReport:
        skipped: dict[str, str] = {}
        chosen = providers or _default_providers(folder, manifest, skipped)
        rows = _run_kind(folder, manifest, normalise_providers(chosen), skipped)
        table = LAYER_TOLERANCES if isinstance(manifest.kind, Layers) else MODEL_TOLERANCES
        return CheckReport(
            str(path),
            digest_file(folder / MANIFEST_FILE),
            manifest.parity.status,
            manifest.parity.tolerance,
            stored_tolerance(manifest, table).gain,
            tuple(rows),
            skipped,
        )

    return open_artifact(folder, True, run, digest)


def _run_kind(
    folder: Path,
    manifest: Manifest,
    providers: Sequence[tuple[str, dict[str, Any]]],
    skipped: dict[str, str],
) -> list[Comparison]:
    match manifest.kind:
        case Layers():
            return layers.check_stored(folder, manifest, providers, skipped)
        case (Model() as whole) | Graph(whole):
            return model.check_stored(folder, manifest, whole, providers, skipped)
        case Decoder() as generates:
            return decoder.check_stored(folder, manifest, generates, providers, skipped)


def _default_providers(folder: Path, manifest: Manifest, skipped: dict[str, str]) -> list[str]:
    """Every provider that can run an artifact here, the CPU first; the others go to `skipped`.

    Raises:
        ProviderError: there is none.
    """
    missing = {CPU: manifest.needs_cuda, CUDA: why_no_cuda()}
    skipped |= {f"onnx-{label_of(name)}": why for name, why in missing.items() if why}
    chosen = [name for name, why in missing.items() if not why]
    if not chosen:
        raise ProviderError(f"{folder}: {missing[CPU]}, and {missing[CUDA]}")
    return chosen


def why_no_cuda() -> str | None:
    """What keeps onnxruntime's CUDA provider from running here; None: nothing."""
    try:
        normalise_providers([CUDA])
        require_device(("cuda", 0))
    except ProviderError as error:
        return str(error)
    return None


def without_nan(data: Any) -> Any:
    """JSON knows no NaN and no Inf: null stands for them."""
    if isinstance(data, dict):
        return {key: without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
