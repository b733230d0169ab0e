"""Outputs beside what they should be -> rows of errors, held to one table of tolerances.

The exporter proves a build by these rows, `check` an artifact on the machine that will serve it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..contract.manifest import Manifest


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
# The graph rounds what its products take to 8 bits (MatMulNBits with accuracy_level 4): half a
# step of 1/127 of a block's largest. A value beside the edge of a step goes to another one for any
# change of its last bit, so that two right ways of computing differ by steps, in gain most of all.
ROUNDED_TOLERANCE = Tolerance(error=5e-2, gain=3e-2, epsilon=2.0**-8)


@dataclass(frozen=True)
class Comparison:
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
    worst_case: str
    """The case that holds the largest error."""
    passed: bool
    broke: tuple[str, ...] = ()
    """The limits that it is beyond: `error`, `gain`."""


@dataclass(frozen=True)
class CasePart:
    """What one case gives of one site and one adapter, [tokens, width] each."""

    case: str
    output: np.ndarray
    expected: np.ndarray
    base_output: np.ndarray
    """What the same implementation gives for these tokens with slot 0."""
    base_expected: np.ndarray
    """What the reference gives with slot 0; equal to `expected` for slot 0 itself."""


def compare(
    labels: tuple[str, str, str, str], pieces: Sequence[CasePart], tolerance: Tolerance
) -> Comparison:
    """Hold one adapter's outputs at one site, over all cases, to the reference.

    Args:
        labels: implementation, layer, site, adapter.
    """
    output, expected, base_output, base_expected = (
        np.concatenate([getattr(piece, part) for piece in pieces])
        for part in ("output", "expected", "base_output", "base_expected")
    )
    output, base_output = output.astype(np.float64), base_output.astype(np.float64)
    errors = np.abs(output - expected)
    error = float(errors.max() / max(float(np.abs(expected).max()), 1e-30))
    broke = [] if error <= tolerance.error else ["error"]  # NaN does not pass
    added, expected_added = output - base_output, expected - base_expected
    norm = float(np.linalg.norm(expected_added))
    cosine = gain = None
    if norm > 0:
        dot = float((added * expected_added).sum())
        gain = dot / norm**2
        cosine = dot / max(norm * float(np.linalg.norm(added)), 1e-30)
        # Rounding y blurs a small difference: per value by epsilon, in the projection by less.
        noise = (
            tolerance.epsilon
            * float(np.linalg.norm(expected))
            / norm
            / np.sqrt(expected_added.size)
        )
        if not abs(gain - 1) <= tolerance.gain + 6 * noise:
            broke.append("gain")
    return Comparison(
        *labels,
        num_tokens=len(output),
        max_abs_error=float(errors.max()),
        mean_abs_error=float(errors.mean()),
        error=error,
        cosine=cosine,
        gain=gain,
        moved=norm / max(float(np.linalg.norm(base_expected)), 1e-30) if norm > 0 else None,
        worst_case=max(pieces, key=_largest_error).case,
        passed=not broke,
        broke=tuple(broke),
    )


def _largest_error(piece: CasePart) -> float:
    """NaN counts as the largest of all; -1 for a piece of no tokens."""
    errors = np.abs(piece.output.astype(np.float64) - piece.expected)
    return float(np.nan_to_num(errors, nan=np.inf).max(initial=-1.0))


def largest(rows: Sequence[Comparison]) -> Comparison:
    """The row to look at first: one that failed before one that passed, then by its error."""
    return max(rows, key=lambda row: (not row.passed, np.nan_to_num(row.error, nan=np.inf)))


def describe_failure(row: Comparison, error: float, gain: float) -> str:
    """Which row failed, by which limit, and what a spec calls that limit."""
    limits = {
        "error": f"its error of {row.error:.2e} is above {error:.0e} (parity.tolerance)",
        "gain": f"its gain of {row.gain or 0:.4f} is off 1 by more than {gain:.0e} (parity.gain)",
        "tokens": f"a token's logit is {row.error:.2e} of the largest below the best one's, more"
        f" than twice {error:.0e} (parity.tolerance)",
    }
    return (
        f"{row.implementation}, layer {row.layer!r}, site {row.site!r}, adapter {row.adapter!r},"
        f" case {row.worst_case!r}: {' and '.join(limits[name] for name in row.broke)}"
    )


def slot_names(manifest: Manifest) -> dict[int, str]:
    """Adapter name by slot, for the adapters that start loaded."""
    return {entry.slot: entry.name for entry in manifest.adapters if entry.slot is not None}


def stored_tolerance(manifest: Manifest, table: dict[str, Tolerance]) -> Tolerance:
    """What the artifact was built with: its dtype's, with what its spec and graph allowed."""
    gain = manifest.parity.gain_tolerance
    tolerance = replace(table[manifest.dtype], error=manifest.parity.tolerance)
    return tolerance if gain is None else replace(tolerance, gain=gain)


def label_of(provider: str) -> str:
    """A provider in the name of an implementation: `cpu` for `CPUExecutionProvider`."""
    return provider.removesuffix("ExecutionProvider").lower()
