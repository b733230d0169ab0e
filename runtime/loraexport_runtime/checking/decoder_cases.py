"""Cases of a decoder: prompts and their adapters, and the tokens and logits they should give.

On both sides of every length at which the model begins to compute something else, and across it
while it generates, beside short rows in the same batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..contract.kinds import Decoder
from ..contract.manifest import Manifest
from .model import BASE, Mix, RowCase, blended_rows, only
from .rows import slot_names
from .stored import SOURCE, read_stored

STEPS = 8
_SHORT = 5
_MOST_ROWS = 32
"""Of a batch: with more adapters there are several."""


@dataclass(frozen=True)
class DecoderReference:
    """By case: the prompts, and for each row its tokens [STEPS] and logits [STEPS, columns]."""

    source: str
    columns: np.ndarray
    """int64: tokens whose logits are compared; of a large vocabulary some, the likeliest too."""
    prompts: dict[str, list[list[int]]]
    tokens: dict[str, np.ndarray]
    """int64 [batch, STEPS]"""
    logits: dict[str, np.ndarray]
    """[batch, STEPS, columns]: step s is what token s is the likeliest of."""
    base_logits: dict[str, np.ndarray]
    """What the base alone gives for the same tokens, [batch, STEPS, columns]."""


def make_cases(manifest: Manifest) -> tuple[RowCase, ...]:
    """Every adapter alone, all mixed with the base, base only, one prompt, blends; and across every
    length.

    To each length belong two prompts, of about its size and of half as much again: what a proof
    takes for a model of long texts is bounded by that. Published artifacts hold what these rows
    give without the rows themselves: a change here needs another format.
    """
    names = slot_names(manifest)
    slots, blends = sorted(names), isinstance(manifest.kind, Decoder) and manifest.kind.blend
    mixed = (*map(only, slots), BASE, only(slots[0]))
    lengths = tuple(4 + 3 * (index % 4) for index in range(len(mixed)))
    starts = range(0, len(mixed), _MOST_ROWS)
    parts = [slice(start, start + _MOST_ROWS) for start in starts]
    return (
        *(RowCase(f"alone-{names[slot]}", (only(slot),) * 2, (5, 9)) for slot in slots),
        *(
            RowCase(f"mixed-{index}" if index else "mixed", mixed[part], lengths[part])
            for index, part in enumerate(parts)
        ),
        RowCase("base-only", (BASE, BASE), (3, 8)),
        RowCase("one-prompt", (only(slots[-1]),), (6,)),
        *([RowCase("blend", blended_rows(slots, [BASE]), (4, 9, 6, 7, 5))] if blends else []),
        *_cases_across(manifest, (only(slots[0]), only(slots[-1]), BASE)),
    )


def _cases_across(manifest: Manifest, rows: tuple[Mix, ...]) -> Iterator[RowCase]:
    """A row that crosses the length while it generates, a short one, and one far beyond it: a
    third of that lies before what a window shows."""
    decoder = manifest.kind
    assert isinstance(decoder, Decoder), "these are cases of a decoder"
    for length in decoder.lengths:
        most = (decoder.max_length or 2 * length) - STEPS
        beyond = length + max(STEPS, length // 2)
        sizes = (max(1, length - STEPS // 2), _SHORT, beyond)
        yield RowCase(f"across-{length}", rows, tuple(min(size, most) for size in sizes))


def load_reference(folder: Path, manifest: Manifest) -> DecoderReference:
    """The reference that a build kept.

    Raises:
        ArtifactError: it is missing, damaged, or not of this manifest.
    """
    stored = read_stored(folder, manifest)
    columns = stored.read("columns", None)
    prompts, tokens, logits, base_logits = {}, {}, {}, {}
    for case in make_cases(manifest):
        shape = len(case.rows), STEPS
        prompts[case.name] = [
            stored.read(f"{case.name}/x/{row}", length).tolist()
            for row, length in enumerate(case.lengths)
        ]
        tokens[case.name] = stored.read(f"{case.name}/tokens", *shape)
        logits[case.name] = stored.read(f"{case.name}/y", *shape, len(columns))
        base_logits[case.name] = stored.read(f"{case.name}/base", *shape, len(columns))
    return DecoderReference(SOURCE, columns, prompts, tokens, logits, base_logits)
