"""Cases of a whole model: rows and their adapters, their inputs, and what the model should give."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adapters.packing import lowest
from ..contract.kinds import Model, TensorEntry
from ..contract.manifest import Manifest
from ..device.dtypes import NUMPY_DTYPES
from ..sessions.model import ModelSession
from ..slots.batch import RowAdapters as Names
from .rows import (
    MODEL_TOLERANCES,
    CasePart,
    Row,
    Tolerance,
    compare,
    label_of,
    slot_names,
    stored_tolerance,
)
from .stored import SOURCE, read_stored

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
    """A batch: what each row uses; of texts also the lengths, padded on one side."""

    name: str
    rows: tuple[Mix, ...]
    lengths: tuple[int, ...]
    left: bool = False

    @property
    def adapter_ids(self) -> np.ndarray:
        """int64 [batch]; 0 for rows that blend."""
        plain = [row[0][0] if _is_plain(row) else 0 for row in self.rows]
        return np.array(plain, dtype=np.int64)

    def adapter_weights(self, num_slots: int) -> np.ndarray:
        """float32 [batch, slots]; 0 but for rows that blend."""
        weights = np.zeros((len(self.rows), num_slots), np.float32)
        for index, row in enumerate(self.rows):
            for slot, weight in () if _is_plain(row) else row:
                weights[index, slot - 1] = weight
        return weights


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


def mix_labels(manifest: Manifest) -> dict[Mix, str]:
    """How a report names the base, and each adapter alone."""
    names: dict[Mix, str] = {BASE: "base"}
    return names | {only(slot): name for slot, name in sorted(slot_names(manifest).items())}


def make_cases(manifest: Manifest, model: Model) -> tuple[RowCase, ...]:
    """Every adapter alone, all mixed (texts with either padding), base only, one row, blends.

    Published artifacts hold what these rows give without the rows themselves: a change here needs
    another format.
    """
    names = slot_names(manifest)
    slots = sorted(names)
    base = [BASE] if _has_base(manifest) else []
    mixed = (*map(only, slots), *base, only(slots[0]))
    lengths = tuple(3 + 4 * (index % 4) for index in range(len(mixed)))
    cases = [RowCase(f"alone-{names[slot]}", (only(slot),) * 2, (6, 10)) for slot in slots]
    cases.append(RowCase("mixed", mixed, lengths))
    if any("sequence" in entry.shape for entry in model.inputs):
        cases.append(RowCase("mixed-left", mixed[::-1], lengths, left=True))
    if base:
        cases.append(RowCase("base-only", (BASE, BASE), (5, 8)))
    cases.append(RowCase("one-row", (only(slots[-1]),), (9,)))
    if model.blend:
        first, last = slots[0], slots[-1]
        # 0.75 of one; a sum that is not 1 and a 0; all of them, one against the others.
        blends: list[Mix] = [((first, 0.75),), ((first, 0.0), (last, 1.5))]
        blends.append(tuple((slot, -0.5 if slot == first else 0.375) for slot in slots))
        rows = (*blends, only(last), *base)
        cases.append(RowCase("blend", rows, (4, 9, 6, 7, 5)[: len(rows)]))
    return tuple(cases)


def _has_base(manifest: Manifest) -> bool:
    """Whether a row may do without an adapter: every head is the base's own."""
    return all(layer.in_base for layer in manifest.layers)


def kept_tokens(inputs: Inputs, output: TensorEntry) -> np.ndarray:
    """What of an output is compared: bool [batch, sequence] without padding, or [batch]."""
    first = next(iter(inputs.values()))
    if "sequence" not in output.shape:
        return np.ones(len(first), dtype=bool)
    mask: np.ndarray = inputs.get("attention_mask", np.ones(first.shape[:2])) == 1
    return mask


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
    folder: Path, manifest: Manifest, model: Model, provider: tuple[str, dict[str, Any]]
) -> Run:
    """The artifact's own session on a provider, every row by its adapters' names."""
    session = ModelSession(folder, manifest, model, [provider], None)
    names = slot_names(manifest)

    def run(inputs: Inputs, case: RowCase) -> Outputs:
        return session.run(inputs, [_row_names(row, names) for row in case.rows])

    return run


def _row_names(row: Mix, names: Mapping[int, str]) -> Names:
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
) -> list[Row]:
    """Run the stored cases on every provider.

    Raises:
        ArtifactError: there are none, or they are damaged.
        ProviderError: a provider cannot run here.
    """
    reference = load_reference(folder, manifest, model)
    tolerance = stored_tolerance(manifest, MODEL_TOLERANCES)
    rows = []
    for provider in providers:
        run = open_runner(folder, manifest, model, provider)
        name = f"onnx-{label_of(provider[0])}"
        rows += compare_model(name, run, manifest, model, reference, tolerance)
    return rows


def compare_model(
    implementation: str,
    run: Run,
    manifest: Manifest,
    model: Model,
    reference: ModelReference,
    tolerance: Tolerance,
    blends: bool = True,
) -> list[Row]:
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
        base_outputs = run(inputs, base_case) if _has_base(manifest) else base
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
