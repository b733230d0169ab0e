"""Cases of single layers: segments of tokens, their inputs, and what each layer should give."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..contract.manifest import Layer, Manifest
from ..sessions.layers import LayersSession
from .rows import (
    LAYER_TOLERANCES,
    CasePart,
    Comparison,
    Tolerance,
    compare,
    slot_names,
    stored_tolerance,
)
from .stored import SOURCE, read_stored
from .ways import ways

MIXED = "mixed"


@dataclass(frozen=True)
class Case:
    """A batch: segments of (slot, number of tokens). Its input is the first tokens of the x."""

    name: str
    segments: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.segments)

    @property
    def seg_indptr(self) -> np.ndarray:
        return np.cumsum([0] + [length for _, length in self.segments], dtype=np.int64)

    @property
    def seg_slots(self) -> np.ndarray:
        return np.array([slot for slot, _ in self.segments], dtype=np.int64)

    @property
    def token_slots(self) -> np.ndarray:
        return np.repeat(self.seg_slots, np.diff(self.seg_indptr))


@dataclass(frozen=True)
class Reference:
    """Inputs and expected outputs of every layer."""

    source: str
    cases: tuple[Case, ...]
    inputs: dict[str, np.ndarray]
    """By layer: x [T, in] or ids [T]."""
    expected: dict[tuple[str, str], np.ndarray]
    """By (layer, case): y [tokens of the case, out]; by (layer, ""): y [T, out] of slot 0."""


Run = Callable[[Layer, np.ndarray, Case], np.ndarray]
"""(layer, x, the segments of x) -> y."""


def make_cases(slot_names: Mapping[int, str], num_tokens: int) -> tuple[Case, ...]:
    """Every adapter alone, all mixed, base only, uneven with empty segments, one token each.

    Published artifacts hold outputs of these segments without the segments themselves: a change
    here needs another format.

    Args:
        slot_names: adapter name by slot, for the slots that start loaded.
        num_tokens: tokens of the mixed cases, at least; every slot gets a few.
    """
    slots = sorted(slot_names)
    alone = [Case(f"alone-{slot_names[slot]}", ((slot, 6), (slot, 3))) for slot in slots]
    lengths = _uneven(num_tokens, len(slots) + 1)
    mixed = Case(MIXED, tuple(zip((*slots, 0), lengths, strict=True)))
    back = [(slot, 2 + index % 3) for index, slot in enumerate(reversed(slots))]
    repeated = Case("repeated-slots", ((0, 1), *back, (0, 0), *reversed(back), (0, 2)))
    uneven = [part for slot in slots for part in ((slot, 0), (slot, 1 + slot % 4), (0, slot % 2))]
    return (
        *alone,
        mixed,
        repeated,
        Case("uneven-and-empty", (*uneven, (slots[0], 0))),
        Case("one-token", ((slots[-1], 1),)),
        Case("base-only", ((0, 7),)),
    )


def _uneven(total: int, parts: int) -> list[int]:
    """Lengths of 2 and more that differ and sum to at least `total`."""
    lengths = [2 + index % 5 for index in range(parts)]
    lengths[0] += max(0, total - sum(lengths))
    return lengths


def load_reference(folder: Path, manifest: Manifest) -> Reference:
    """The reference that a build kept: float32, so good to about 1e-7.

    Raises:
        ArtifactError: it is missing, damaged, or not of this manifest.
    """
    stored = read_stored(folder, manifest)
    first = manifest.layers[0]
    # The spec says how many tokens the mixed case has at least; the case itself says so too.
    num_tokens = len(stored.read(f"{first.name}/y/{MIXED}", None, first.out_features))
    cases = make_cases(slot_names(manifest), num_tokens)
    total = max(case.num_tokens for case in cases)
    inputs, expected = {}, {}
    for layer in manifest.layers:
        columns = () if layer.kind == "embedding" else (layer.in_features,)
        inputs[layer.name] = stored.read(f"{layer.name}/x", total, *columns)
        for name, rows in (("", total), *((case.name, case.num_tokens) for case in cases)):
            array = stored.read(f"{layer.name}/y/{name}", rows, layer.out_features)
            expected[layer.name, name] = array
    return Reference(SOURCE, cases, inputs, expected)


def open_runner(
    folder: Path, manifest: Manifest, provider: tuple[str, dict[str, Any]], kernels: bool
) -> Run:
    """The artifact's own session on a provider, every segment by its adapter's name."""
    session = LayersSession(folder, manifest, [provider], None, kernels=kernels)
    names = slot_names(manifest)

    def run(layer: Layer, x: np.ndarray, case: Case) -> np.ndarray:
        segments = [(names.get(slot), length) for slot, length in case.segments]
        y: np.ndarray = session[layer.name].run(x, segments)
        return y

    return run


def check_stored(
    folder: Path,
    manifest: Manifest,
    providers: Sequence[tuple[str, dict[str, Any]]],
    skipped: dict[str, str],
) -> list[Comparison]:
    """Run the stored cases on every provider, with kernels too where they can run.

    Raises:
        ArtifactError: there are none, or they are damaged.
        ProviderError: a provider cannot run here.
    """
    reference = load_reference(folder, manifest)
    tolerance = stored_tolerance(manifest, LAYER_TOLERANCES)
    rows = []
    for provider in providers:
        for label, kernels in ways(manifest, provider, skipped):
            run = open_runner(folder, manifest, provider, kernels)
            rows += compare_layers(f"onnx-{label}", run, manifest, reference, tolerance)
    return rows


def compare_layers(
    implementation: str, run: Run, manifest: Manifest, reference: Reference, tolerance: Tolerance
) -> list[Comparison]:
    """Run every case on every layer; a row for each site and adapter."""
    names = slot_names(manifest)
    return [
        row
        for layer in manifest.layers
        for row in _compare_layer(implementation, run, layer, names, reference, tolerance)
    ]


def _compare_layer(
    implementation: str,
    run: Run,
    layer: Layer,
    names: Mapping[int, str],
    reference: Reference,
    tolerance: Tolerance,
) -> list[Comparison]:
    x, cases = reference.inputs[layer.name], reference.cases
    base_output = run(layer, x, Case("base", ((0, len(x)),)))
    base_expected = reference.expected[layer.name, ""]
    outputs = [run(layer, x[: case.num_tokens], case) for case in cases]
    rows = []
    for slot in (0, *sorted(names)):
        tokens = [np.flatnonzero(case.token_slots == slot) for case in cases]
        for part in layer.slices:
            columns = slice(part.offset, part.offset + part.width)
            pieces = [
                CasePart(
                    case.name,
                    output[picked][:, columns],
                    reference.expected[layer.name, case.name][picked][:, columns],
                    base_output[picked][:, columns],
                    base_expected[picked][:, columns],
                )
                for case, output, picked in zip(cases, outputs, tokens, strict=True)
            ]
            labels = (implementation, layer.name, part.site, names.get(slot, "base"))
            rows.append(compare(labels, pieces, tolerance))
    return rows
