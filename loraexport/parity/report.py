"""What verify found: rows of errors, their verdict, parity.json and parity.md."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from loraexport_runtime.contract.manifest import Manifest, ParityStatus, ParitySummary

from ..spec.schema import Spec


@dataclass(frozen=True)
class Tolerance:
    """How far a graph may be from the float64 oracle."""

    error: float
    """Of max |y - ref| / max |ref|, per adapter and site."""
    gain: float
    """Of |gain - 1|; gain = <d, d_ref> / <d_ref, d_ref>, d what the adapter adds to the base."""
    epsilon: float
    """Half the spacing of the dtype at 1: what rounding y alone costs, relatively."""


LAYER_TOLERANCES = {
    # Sums of a few thousand float32 products in another order: 1e-6 is common.
    "float32": Tolerance(error=2e-5, gain=1e-4, epsilon=2.0**-24),
    # Weights, x A^T and y are rounded to 11 bits each; sums are float32 inside.
    "float16": Tolerance(error=4e-3, gain=5e-3, epsilon=2.0**-11),
    # The same with 8 bits.
    "bfloat16": Tolerance(error=3e-2, gain=4e-2, epsilon=2.0**-8),
}
MODEL_TOLERANCES = {
    # A dozen layers add up what one layer rounds (see above), and gain is not linear.
    "float32": Tolerance(error=1e-4, gain=1e-3, epsilon=2.0**-24),
    "float16": Tolerance(error=2e-2, gain=3e-2, epsilon=2.0**-11),
    "bfloat16": Tolerance(error=1e-1, gain=1e-1, epsilon=2.0**-8),
}


@dataclass(frozen=True)
class Row:
    """One implementation, one site, one adapter, over all tokens of all cases that use it."""

    implementation: str
    layer: str
    site: str
    adapter: str
    """`base` for the tokens of slot 0."""
    num_tokens: int
    max_abs_error: float
    mean_abs_error: float
    error: float
    cosine: float | None
    """Between what the adapter adds and what it should add; None for the base."""
    gain: float | None
    moved: float | None
    """How far the adapter moves the output, as it should: |y_ref - base_ref| / |base_ref|."""
    passed: bool


@dataclass(frozen=True)
class Report:
    """All rows, and against what they were measured."""

    reference: str
    dtype: str
    tolerance: float
    rows: tuple[Row, ...]
    skipped: dict[str, str]
    """Implementation -> why it was not run."""
    environment: dict[str, str]
    deferred: bool = False

    @property
    def failures(self) -> tuple[Row, ...]:
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
        return ParitySummary(self.status, checked, worst, self.tolerance)

    def to_json(self) -> str:
        data = {"status": self.status, **dataclasses.asdict(self)}
        return json.dumps(_without_nan(data), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        lines = [
            f"# Parity: {self.status}",
            "",
            f"Against {self.reference}, {self.dtype}, tolerance {self.tolerance:g} of"
            " max |y - ref| / max |ref|.",
            "`gain` is what the adapter adds, projected on what it should add: 1 is right.",
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
            verdict = "ok" if row.passed else "FAILED"
            lines.append(
                f"| {row.implementation} | {row.layer} | {row.site} | {row.adapter} |"
                f" {row.num_tokens} | {row.max_abs_error:.2e} | {row.mean_abs_error:.2e} |"
                f" {row.error:.2e} | {cosine} | {gain} | {moved} | {verdict} |"
            )
        lines += ["", *(f"Not run: {name}: {why}" for name, why in self.skipped.items())]
        lines += [f"{key}: {value}" for key, value in self.environment.items()]
        return "\n".join(lines) + "\n"


def _without_nan(data: Any) -> Any:
    """JSON knows no NaN and no Inf: null stands for them."""
    if isinstance(data, dict):
        return {key: _without_nan(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not np.isfinite(data) else data


def compare(
    labels: tuple[str, str, str, str],
    output: np.ndarray,
    expected: np.ndarray,
    base_output: np.ndarray,
    base_expected: np.ndarray,
    tolerance: Tolerance,
) -> Row:
    """Hold one adapter's outputs at one site, [tokens, width] each, to the reference.

    Args:
        labels: implementation, layer, site, adapter.
        base_output: what the same implementation gives for these tokens with slot 0.
        base_expected: what the reference gives with slot 0; equal to expected for slot 0 itself.
    """
    output, base_output = output.astype(np.float64), base_output.astype(np.float64)
    errors = np.abs(output - expected)
    error = float(errors.max() / max(float(np.abs(expected).max()), 1e-30))
    passed = bool(error <= tolerance.error)  # NaN does not pass
    added, wanted = output - base_output, expected - base_expected
    norm = float(np.linalg.norm(wanted))
    cosine = gain = None
    if norm > 0:
        dot = float((added * wanted).sum())
        gain = dot / norm**2
        cosine = dot / max(norm * float(np.linalg.norm(added)), 1e-30)
        # Rounding y blurs a small difference: per value by epsilon, in the projection by less.
        noise = tolerance.epsilon * float(np.linalg.norm(expected)) / norm / np.sqrt(wanted.size)
        passed = passed and bool(abs(gain - 1) <= tolerance.gain + 6 * noise)
    return Row(
        *labels,
        num_tokens=len(output),
        max_abs_error=float(errors.max()),
        mean_abs_error=float(errors.mean()),
        error=error,
        cosine=cosine,
        gain=gain,
        moved=norm / max(float(np.linalg.norm(base_expected)), 1e-30) if norm > 0 else None,
        passed=passed,
    )


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
