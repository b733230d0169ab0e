"""The rows of a cache: who uses which, and what those that nobody uses still hold."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from ...slots.lease import Content

T = TypeVar("T")
LEAST_PREFIX = 16
"""Fewer tokens are read again: finding and copying them is not free."""


@dataclass(eq=False)
class Row(Generic[T]):
    """One text's place in the cache."""

    index: int
    tokens: np.ndarray
    """int64 [length]: of its text, as far as it is known."""
    num_read: int = 0
    """So many of them have keys and values in the cache."""
    num_touched: int = 0
    """Positions that may not be zero any more."""
    content: Content = None
    """Under which adapter they were read."""
    is_long: bool = False
    """And with the factors of a long text (see rope.py)."""
    user: T | None = None
    last_use: int = 0

    @property
    def end(self) -> int:
        """From here on all positions are zero: a step may have been made for the token behind those
        that are read."""
        return max(self.num_touched, self.num_read + 1)

    @property
    def is_kept(self) -> bool:
        """Whether nobody uses it, and it holds a text."""
        return self.user is None and self.num_read > 0


@dataclass(eq=False)
class Rows(Generic[T]):
    """All rows, the lowest first, as a step computes the first ones."""

    rows: list[Row[T]] = field(default_factory=list)
    _clock: int = 0

    @classmethod
    def make(cls, num: int, length: int) -> "Rows[T]":
        """Empty ones."""
        return cls([Row(index, np.zeros(length, np.int64)) for index in range(num)])

    @property
    def used(self) -> list[Row[T]]:
        return [row for row in self.rows if row.user is not None]

    def lowest_free(self) -> Row[T] | None:
        """The first row that nobody uses."""
        return next((row for row in self.rows if row.user is None), None)

    def spare(self, target: Row[T], source: Row[T] | None) -> Row[T] | None:
        """Where a kept row's text goes when its place is taken: an empty row, or the one whose text
        was not used for longer; None: it is the oldest itself."""
        others = [row for row in self.rows if row.user is None and row not in (target, source)]
        empty = [row for row in others if not row.is_kept]
        if empty:
            return empty[0]
        oldest = min(others, key=lambda row: row.last_use, default=None)
        return oldest if oldest is not None and oldest.last_use < target.last_use else None

    def longest_prefix(
        self, tokens: np.ndarray, content: Content, is_long: bool = False
    ) -> tuple[Row[T] | None, int]:
        """The row that has most of a prompt's first tokens under the same adapter and factors, used
        or not, and how many; two at least of the prompt are left to be read."""
        best: tuple[Row[T] | None, int] = (None, 0)
        for row in self.rows:
            num = min(row.num_read, len(tokens) - 2)
            if num <= best[1] or (row.content, row.is_long) != (content, is_long):
                continue
            differ = np.flatnonzero(row.tokens[:num] != tokens[:num])
            num = int(differ[0]) if len(differ) else num
            if num > best[1] and num >= LEAST_PREFIX:
                best = row, num
        return best

    def touch(self, row: Row[T]) -> None:
        """It is used now."""
        self._clock += 1
        row.last_use = self._clock
