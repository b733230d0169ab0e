"""The batches on which a whole model is proven: rows, their adapters, their inputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraexport_runtime.contract.kinds import Model, TensorEntry
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..report import slot_names

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


def _is_plain(row: Mix) -> bool:
    return len(row) == 1 and row[0][1] == 1.0


def make_cases(manifest: Manifest, model: Model) -> tuple[RowCase, ...]:
    """Every adapter alone, all mixed (texts with either padding), base only, one row, blends."""
    names = slot_names(manifest)
    slots = sorted(names)
    has_base = all(layer.in_base for layer in manifest.layers)
    base = [BASE] if has_base else []
    mixed = (*map(only, slots), *base, only(slots[0]))
    lengths = tuple(3 + 4 * (index % 4) for index in range(len(mixed)))
    cases = [RowCase(f"alone-{names[slot]}", (only(slot),) * 2, (6, 10)) for slot in slots]
    cases.append(RowCase("mixed", mixed, lengths))
    if any("sequence" in entry.shape for entry in model.inputs):
        cases.append(RowCase("mixed-left", mixed[::-1], lengths, left=True))
    if has_base:
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


def make_inputs(
    case: RowCase, entries: Sequence[TensorEntry], vocabulary: int, seed: int, pad: int = 0
) -> Inputs:
    """Random ids other than `pad`, and the masks that the lengths and the padding's side ask for.

    Images are standard normal, one per row; lengths mean nothing to them.
    Some models (RoBERTa) find positions, others (Llama, to classify) the last token, by `pad`.
    """
    generator = np.random.default_rng([seed, len(case.rows), *case.lengths, int(case.left)])
    shape = (len(case.rows), max(case.lengths))
    for entry in entries:
        if entry.name == "pixel_values":
            pixels = generator.standard_normal(entry.sizes(*shape))
            return {entry.name: pixels.astype(NUMPY_DTYPES[entry.dtype])}
    mask = np.zeros(shape, np.int64)
    for row, length in enumerate(case.lengths):
        mask[row, -length if case.left else 0 : None if case.left else length] = 1
    ids = generator.integers(0, vocabulary - 1, shape)
    values = {
        "input_ids": np.where(mask == 1, ids + (ids >= pad), pad),
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
        "position_ids": np.tile(np.arange(shape[1]), (shape[0], 1)),
    }
    return {entry.name: values[entry.name] for entry in entries}


def kept_tokens(inputs: Inputs, output: TensorEntry) -> np.ndarray:
    """What of an output is compared: bool [batch, sequence] without padding, or [batch]."""
    first = next(iter(inputs.values()))
    if "sequence" not in output.shape:
        return np.ones(len(first), dtype=bool)
    mask: np.ndarray = inputs.get("attention_mask", np.ones(first.shape[:2])) == 1
    return mask
