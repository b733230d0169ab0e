"""Which adapter each row of a batch uses."""

import numpy as np

from .schema import Distribution


def draw_slots(distribution: Distribution, rows: int, adapters: int, seed: int) -> list[int]:
    """A slot from 1 to `adapters` for each row.

    one: slot 1; uniform: drawn alike; zipf: slot k with probability in proportion to 1 / k;
    distinct: each in turn.
    """
    if distribution == "one":
        return [1] * rows
    if distribution == "distinct":
        return [1 + row % adapters for row in range(rows)]
    slots = np.arange(1, adapters + 1)
    weights = np.ones(adapters) if distribution == "uniform" else 1 / slots
    generator = np.random.default_rng([seed, rows, adapters])
    return [int(slot) for slot in generator.choice(slots, rows, p=weights / weights.sum())]


def even_bounds(tokens: int, rows: int) -> list[int]:
    """Where the rows begin and end: lengths that differ by one token at most, [rows + 1]."""
    return [row * tokens // rows for row in range(rows + 1)]


def spread_lengths(rows: int, tokens: int, fill: float) -> list[int]:
    """Lengths of rows that go up evenly to `tokens`, with a mean of `fill` times that."""
    shortest = max(1.0, (2 * fill - 1) * tokens)
    return [int(length) for length in np.linspace(shortest, tokens, rows).round()]


def rows_by_slot(slots: list[int]) -> dict[int, list[int]]:
    """Slot -> its rows, in order."""
    groups: dict[int, list[int]] = {}
    for row, slot in enumerate(slots):
        groups.setdefault(slot, []).append(row)
    return dict(sorted(groups.items()))
