"""Cases of a whole model: rows and their adapters, their inputs, and what the model should give."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.packing import lowest
from ..contract.kinds import Model, TensorEntry, sequence_of
from ..contract.manifest import Manifest
from ..device.dtypes import NUMPY_DTYPES
from ..sessions.model import ModelSession
from ..slots.batch import RowAdapters as Names
from ..slots.batch import weight_rows
from .rows import (
    MODEL_TOLERANCES,
    CasePart,
    Comparison,
    Tolerance,
    compare,
    slot_names,
    stored_tolerance,
)
from .stored import SOURCE, read_stored
from .ways import ways

Inputs = dict[str, np.ndarray]
Outputs = dict[str, np.ndarray]
Mix = tuple[tuple[int, float], ...]
"""What a row uses: (slot, weight) pairs; none for the base, one of weight 1 for an adapter."""
BASE: Mix = ()


def only(slot: int) -> Mix:
    """One adapter."""
    return ((slot, 1.0),)


@dataclass(frozen=True)
class RowCase:
    """A batch: what each row uses; of texts and sounds also the lengths, padded on one side."""

    name: str
    rows: tuple[Mix, ...]
    lengths: tuple[int, ...]
    left: bool = False

    @property
    def adapter_ids(self) -> np.ndarray:
        """int64 [batch]; 0 for rows that blend."""
        return slots_of(self.rows)

    def adapter_weights(self, num_slots: int) -> np.ndarray:
        """float32 [batch, slots]; 0 but for rows that blend."""
        return weights_of(self.rows, num_slots)


@dataclass(frozen=True)
class ModelReference:
    """By case: inputs, and by output's name what is expected and what the base alone gives."""

    source: str
    inputs: dict[str, Inputs]
    expected: dict[str, Outputs]
    base_expected: dict[str, Outputs]


Run = Callable[[Inputs, RowCase], Outputs]
"""(inputs by name, what each row uses) -> the model's outputs by name."""


def _is_plain(row: Mix) -> bool:
    return len(row) == 1 and row[0][1] == 1.0


def slots_of(rows: Sequence[Mix]) -> np.ndarray:
    """adapter_ids int64 [batch]; 0 for rows that blend."""
    return np.array([row[0][0] if _is_plain(row) else 0 for row in rows], dtype=np.int64)


def weights_of(rows: Sequence[Mix], num_slots: int) -> np.ndarray:
    """adapter_weights float32 [batch, slots]; 0 but for rows that blend."""
    return weight_rows([() if _is_plain(row) else row for row in rows], num_slots)


def blended_rows(slots: Sequence[int], base: Sequence[Mix]) -> tuple[Mix, ...]:
    """Rows that blend, beside some that do not; `base`: BASE where a row may do without."""
    first, last = slots[0], slots[-1]
    # 0.75 of one; a sum that is not 1 and a 0; all of them, one against the others.
    blends: list[Mix] = [((first, 0.75),), ((first, 0.0), (last, 1.5))]
    blends.append(tuple((slot, -0.5 if slot == first else 0.375) for slot in slots))
    return (*blends, only(last), *base)


def mix_labels(manifest: Manifest) -> dict[Mix, str]:
    """How a report names the base, and each adapter alone."""
    names: dict[Mix, str] = {BASE: "base"}
    return names | {only(slot): name for slot, name in sorted(slot_names(manifest).items())}


def make_cases(manifest: Manifest, model: Model) -> tuple[RowCase, ...]:
    """Every adapter alone, all mixed (texts with either padding), base only, one row, blends.

    Lengths are of tokens, or of samples of which so many steps come out; sounds end in padding.
    Published artifacts hold what these rows give without the rows themselves: a change here needs
    another format.
    """
    names = slot_names(manifest)
    slots = sorted(names)
    base = [BASE] if manifest.runs_base else []
    mixed = (*map(only, slots), *base, only(slots[0]))
    stride = sequence_of(model.outputs, 2) - sequence_of(model.outputs, 1)

    def add(name: str, rows: tuple[Mix, ...], steps: Iterable[int], left: bool = False) -> None:
        lengths = tuple(sequence_of(model.outputs, count) + stride // 3 for count in steps)
        cases.append(RowCase(name, rows, lengths, left))

    cases: list[RowCase] = []
    for slot in slots:
        add(f"alone-{names[slot]}", (only(slot),) * 2, (6, 10))
    steps = [3 + 4 * (index % 4) for index in range(len(mixed))]
    add("mixed", mixed, steps)
    if any("sequence" in entry.shape for entry in model.inputs) and stride == 1:
        add("mixed-left", mixed[::-1], steps, left=True)
    if base:
        add("base-only", (BASE, BASE), (5, 8))
    add("one-row", (only(slots[-1]),), (9,))
    if model.blend:
        rows = blended_rows(slots, base)
        add("blend", rows, (4, 9, 6, 7, 5)[: len(rows)])
    longest = model.facts.positions
    if longest is None:
        return tuple(cases)
    return tuple(
        replace(case, lengths=tuple(min(length, longest) for length in case.lengths))
        for case in cases
    )


def kept_tokens(inputs: Inputs, output: TensorEntry) -> np.ndarray:
    """What of an output is compared: bool [batch, n] without what follows from padding, or [batch].

    Behind a text's tokens stands what has no padding; of a sound the first steps are its own.
    """
    first = next(iter(inputs.values()))
    rows = len(first)
    if not any("sequence" in size for size in output.shape[1:2]):
        return np.ones(rows, dtype=bool)
    mask = inputs.get("attention_mask", np.ones(first.shape[:2]))
    count = output.sizes(*mask.shape)[1]
    if count < mask.shape[1]:
        kept = [output.sizes(1, length)[1] for length in mask.sum(1).tolist()]
        return np.arange(count) < np.array(kept)[:, None]
    behind = np.ones((rows, count - mask.shape[1]), dtype=bool)
    return np.concatenate([mask == 1, behind], axis=1)


def load_reference(folder: Path, manifest: Manifest, model: Model) -> ModelReference:
    """The reference that a build kept.

    Raises:
        ArtifactError: it is missing, damaged, or not of this manifest.
    """
    stored = read_stored(folder, manifest)
    inputs, expected, base_expected = {}, {}, {}
    for case in make_cases(manifest, model):
        shape = len(case.rows), max(case.lengths)
        inputs[case.name] = {
            entry.name: stored.read(f"{case.name}/x/{entry.name}", *entry.sizes(*shape))
            for entry in model.inputs
        }
        expected[case.name], base_expected[case.name] = (
            {
                entry.name: stored.read(f"{case.name}/{part}/{entry.name}", *entry.sizes(*shape))
                for entry in model.outputs
            }
            for part in ("y", "base")
        )
    return ModelReference(SOURCE, inputs, expected, base_expected)


def open_runner(
    folder: Path,
    manifest: Manifest,
    model: Model,
    provider: tuple[str, dict[str, Any]],
    kernels: bool,
) -> Run:
    """The artifact's own session on a provider, every row by its adapters' names."""
    session = ModelSession(folder, manifest, model, [provider], None, kernels=kernels)
    names = slot_names(manifest)

    def run(inputs: Inputs, case: RowCase) -> Outputs:
        return session.run(inputs, [row_names(row, names) for row in case.rows])

    return run


def row_names(row: Mix, names: Mapping[int, str]) -> Names:
    """What a session is told of a row; `names`: of the slots."""
    if row == BASE:
        return None
    if _is_plain(row):
        return names[row[0][0]]
    return {names[slot]: weight for slot, weight in row}


def check_stored(
    folder: Path,
    manifest: Manifest,
    model: Model,
    providers: Sequence[tuple[str, dict[str, Any]]],
    skipped: dict[str, str],
) -> list[Comparison]:
    """Run the stored cases on every provider, with kernels too where they can run.

    Raises:
        ArtifactError: there are none, or they are damaged.
        ProviderError: a provider cannot run here.
    """
    reference = load_reference(folder, manifest, model)
    tolerance = stored_tolerance(manifest, MODEL_TOLERANCES)
    rows = []
    for provider in providers:
        for label, kernels in ways(manifest, provider, skipped):
            run = open_runner(folder, manifest, model, provider, kernels)
            rows += compare_model(f"onnx-{label}", run, manifest, model, reference, tolerance)
    return rows


def compare_model(
    implementation: str,
    run: Run,
    manifest: Manifest,
    model: Model,
    reference: ModelReference,
    tolerance: Tolerance,
    blends: bool = True,
) -> list[Comparison]:
    """Run every case; a row for each output and adapter, and one for all blends.

    Args:
        blends: False leaves rows that blend out, for an implementation with other rules.
    """
    labels = mix_labels(manifest)
    pieces: dict[tuple[str, str], list[CasePart]] = {
        (entry.name, who): [] for entry in model.outputs for who in (*labels.values(), "blend")
    }
    for case in make_cases(manifest, model):
        inputs = reference.inputs[case.name]
        expected, base = reference.expected[case.name], reference.base_expected[case.name]
        outputs = run(inputs, case)
        base_case = RowCase(case.name, (BASE,) * len(case.rows), case.lengths, case.left)
        base_outputs = run(inputs, base_case) if manifest.runs_base else base
        for entry in model.outputs:
            four = [part[entry.name] for part in (outputs, expected, base_outputs, base)]
            if any(layer.labels for layer in manifest.layers):
                missing = lowest(NUMPY_DTYPES[manifest.dtype])
                four[:2] = _without_missing_labels(four[0], four[1], missing)
                four[2:] = _without_missing_labels(four[2], four[3], missing)
            tokens = kept_tokens(inputs, entry)
            for mix in set(case.rows):
                if not blends and mix not in labels:
                    continue
                keep = (tokens.T & np.array([row == mix for row in case.rows])).T
                piece = CasePart(case.name, *(part[keep] for part in four))
                pieces[entry.name, labels.get(mix, "blend")].append(piece)
    return [
        compare((implementation, model.task, output, who), parts, tolerance)
        for (output, who), parts in pieces.items()
        if parts
    ]


def _without_missing_labels(
    y: np.ndarray, expected: np.ndarray, missing: float
) -> tuple[np.ndarray, np.ndarray]:
    """Zeros for the labels that a row's head lacks, NaN where y gives one to such a row."""
    lacks = expected == np.float32(missing)
    wrong = lacks & (y.astype(np.float32) != np.float32(missing))
    zeroed = np.where(lacks, 0, y.astype(np.float64))
    return np.where(wrong, np.nan, zeroed), np.where(lacks, 0, expected)
