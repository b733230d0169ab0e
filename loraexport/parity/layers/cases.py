"""Parity cases: who uses which tokens, and the inputs that all of them share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.device.dtypes import NUMPY_DTYPES


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


def make_cases(slot_names: Mapping[int, str], num_tokens: int) -> tuple[Case, ...]:
    """Every adapter alone, all mixed, base only, uneven with empty segments, one token each.

    Args:
        slot_names: adapter name by slot, for the slots that start loaded.
        num_tokens: tokens of the mixed cases, at least; every slot gets a few.
    """
    slots = sorted(slot_names)
    alone = [Case(f"alone-{slot_names[slot]}", ((slot, 6), (slot, 3))) for slot in slots]
    lengths = _uneven(num_tokens, len(slots) + 1)
    mixed = Case("mixed", tuple(zip((*slots, 0), lengths, strict=True)))
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


def make_input(layer: Layer, cases: Sequence[Case], dtype: str, seed: int) -> np.ndarray:
    """x [T, in] standard normal in the export's dtype, or ids int64 [T]; T serves every case."""
    digits = [ord(letter) for letter in layer.name]
    generator = np.random.default_rng([seed, *digits])
    num_tokens = max(case.num_tokens for case in cases)
    if layer.kind == "embedding":
        return generator.integers(0, layer.in_features, num_tokens)
    return generator.standard_normal((num_tokens, layer.in_features)).astype(NUMPY_DTYPES[dtype])


def _uneven(total: int, parts: int) -> list[int]:
    """Lengths of 2 and more that differ and sum to at least `total`."""
    lengths = [2 + index % 5 for index in range(parts)]
    lengths[0] += max(0, total - sum(lengths))
    return lengths
