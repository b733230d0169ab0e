"""What verify found: rows of errors, their verdict, parity.json and parity.md."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from loraexport_runtime.checking.check import without_nan
from loraexport_runtime.checking.rows import ROUNDED_TOLERANCE, Comparison, Tolerance
from loraexport_runtime.contract.manifest import Manifest, ParityStatus, ParitySummary

from ..graphs.files import rounds_activations
from ..spec.schema import Spec


@dataclass(frozen=True)
class Report:
    """All rows, and against what they were measured."""

    reference: str
    dtype: str
    tolerance: float
    gain_tolerance: float
    rows: tuple[Comparison, ...]
    skipped: dict[str, str]
    """Implementation -> why it was not run."""
    environment: dict[str, str]
    deferred: bool = False

    @property
    def failures(self) -> tuple[Comparison, ...]:
        return tuple(row for row in self.rows if not row.passed)

    @property
    def silent_adapters(self) -> tuple[str, ...]:
        """Adapters that should add nothing anywhere: all their B (or their scale) is zero."""
        names = dict.fromkeys(row.adapter for row in self.rows if row.adapter != "base")
        moved = {row.adapter for row in self.rows if row.gain is not None}
        return tuple(name for name in names if name not in moved)

    @property
    def status(self) -> ParityStatus:
        return "failed" if self.failures else "deferred" if self.deferred else "passed"

    def summary(self) -> ParitySummary:
        checked = tuple(dict.fromkeys(row.implementation for row in self.rows))
        errors = [row.error for row in self.rows]
        worst = max(errors) if errors and np.isfinite(errors).all() else None
        return ParitySummary(self.status, checked, worst, self.tolerance, self.gain_tolerance)

    def to_json(self) -> str:
        data = {"status": self.status, **dataclasses.asdict(self)}
        return json.dumps(without_nan(data), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        lines = [
            f"# Parity: {self.status}",
            "",
            f"Against {self.reference}, {self.dtype}, tolerance {self.tolerance:g} of"
            " max |y - ref| / max |ref|.",
            "`gain` is what the adapter adds, projected on what it should add: 1 is right, to"
            f" {self.gain_tolerance:g}.",
            "`moved` is how far the adapter moves the output of its base, as it should.",
            "",
            "| implementation | layer | site | adapter | tokens | max abs | mean abs | error |"
            " cosine | gain | moved | |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in self.rows:
            cosine = "" if row.cosine is None else f"{row.cosine:.6f}"
            gain = "" if row.gain is None else f"{row.gain:.5f}"
            moved = "" if row.moved is None else f"{100 * row.moved:.2f} %"
            verdict = "ok" if row.passed else f"FAILED: {', '.join(row.broke)}"
            lines.append(
                f"| {row.implementation} | {row.layer} | {row.site} | {row.adapter} |"
                f" {row.num_tokens} | {row.max_abs_error:.2e} | {row.mean_abs_error:.2e} |"
                f" {row.error:.2e} | {cosine} | {gain} | {moved} | {verdict} |"
            )
        lines += ["", *(f"Not run: {name}: {why}" for name, why in self.skipped.items())]
        lines += [f"{key}: {value}" for key, value in self.environment.items()]
        return "\n".join(lines) + "\n"


def tolerance_of(
    spec: Spec, table: Mapping[str, Tolerance], graph: Path | None = None
) -> Tolerance:
    """The dtype's own, or that of a graph which rounds, unless the spec sets what it allows."""
    rounds = graph is not None and rounds_activations(graph)
    tolerance = ROUNDED_TOLERANCE if rounds else table[spec.export.dtype]
    if spec.parity.tolerance is not None:
        tolerance = replace(tolerance, error=spec.parity.tolerance)
    if spec.parity.gain is not None:
        tolerance = replace(tolerance, gain=spec.parity.gain)
    return tolerance


def make_report(
    source: str,
    manifest: Manifest,
    tolerance: Tolerance,
    rows: Sequence[Comparison],
    skipped: dict[str, str],
    has_onnx: bool,
) -> Report:
    """The report of all rows; deferred, if there are ONNX graphs that nothing ran."""
    ran_onnx = any(row.implementation.startswith("onnx") for row in rows)
    return Report(
        source,
        manifest.dtype,
        tolerance.error,
        tolerance.gain,
        tuple(rows),
        skipped,
        environment(),
        deferred=has_onnx and not ran_onnx,
    )


def environment() -> dict[str, str]:
    """What the figures depend on."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
    }
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name(0)
    return versions
