"""Whose prompt is read next, and how much of it."""

from collections.abc import Iterator

from .jobs import Answer
from .rows import Row, Rows

MOST_RUNS, MOST_SINGLE_RUNS = 4, 16
"""In a round, whatever is left of the quota: on a device the shortest run launches all kernels, and
short prompts are read together; on a CPU, where each is read alone, it reads all weights."""
MOST_QUOTAS, MOST_JOINED = 8, 4
"""Quotas of a round where more rows wait for their prompts than decode, and of one run of it."""
PATIENCE = 4
"""So many shorter prompts may be read before a longer one that came earlier."""


class PromptOrder:
    """The prompts in the rows of an engine, read chunk by chunk."""

    def __init__(self, rows: Rows[Answer], quota: int, joins: bool) -> None:
        """
        Args:
            quota: tokens of a chunk.
            joins: short prompts of rows that lie side by side are read together.
        """
        self._rows = rows
        self._quota = quota
        self._joins = joins
        self._least = -(-quota // (MOST_RUNS if joins else MOST_SINGLE_RUNS))
        """What a run counts of the quota at least."""

    def round(self) -> Iterator[list[Row[Answer]]]:
        """What is read before the next steps, run by run, until the quota is used up. A run is a
        chunk of one prompt, or some prompts of neighbouring rows; it has been read when the next
        one is asked for."""
        left = self._quota * self._num_quotas()
        while left > 0 and (rows := self._next(left)):
            width = max(self.chunk_end(row) - row.num_read for row in rows)
            left -= max(len(rows) * width, self._least)
            yield rows

    def _num_quotas(self) -> int:
        """A step takes about as long for one row as for all: who decodes waits for as many quotas
        as there are rows that wait for each of them."""
        used = self._rows.used
        decoding = sum(row.user is not None and row.user.goes_on for row in used)
        return min(MOST_QUOTAS, max(1, (len(used) - decoding) // max(1, decoding)))

    def _next(self, left: int) -> list[Row[Answer]]:
        """The shortest remainder first; but one that others overtook often goes ahead of them.

        Args:
            left: of the quota; whoever has more to read now waits for the next round's.
        """
        waiting = [row for row in self._rows.used if row.user and not row.user.goes_on]
        if not waiting:
            return []

        def rank(row: Row[Answer]) -> tuple[bool, int, int]:
            answer = row.user
            assert answer is not None, "it has a prompt"
            is_late = answer.num_passed >= PATIENCE
            left = 0 if is_late else len(answer.prompt) - row.num_read
            return not is_late, left, answer.order

        first = min(waiting, key=rank)
        if self.chunk_end(first) - first.num_read > left < self._quota:
            return []
        rows = self._join(first, left) if self._joins else [first]
        newest = max(row.user.order for row in rows if row.user)
        for row in waiting:
            if row.user and row not in rows and row.user.order < newest:
                row.user.num_passed += 1
        return rows

    def _join(self, first: Row[Answer], left: int) -> list[Row[Answer]]:
        """Rows beside the first one that can be read with it: whole prompts of like length."""
        rows, longest = [first], self.chunk_end(first)

        def fits(row: Row[Answer]) -> bool:
            answer = row.user
            if answer is None or answer.goes_on or row.num_read or answer.reports:
                return False
            size = len(answer.prompt)
            width = max(longest, size)
            most = min(left, MOST_JOINED * self._quota)
            return width * (len(rows) + 1) <= most and 2 * min(longest, size) >= width

        if not fits(first):
            return rows
        for row in self._rows.rows[first.index + 1 :]:
            if not fits(row):
                break
            rows.append(row)
            longest = max(longest, self.chunk_end(row))
        return rows

    def chunk_end(self, row: Row[Answer]) -> int:
        """Chunks end at multiples of the quota, so that a prompt is cut as if it were alone; no
        single token is left, as onnxruntime's product of one row rounds otherwise on a CPU."""
        assert row.user is not None, "it has a prompt"
        size = len(row.user.prompt)
        end = min(size, (row.num_read // self._quota + 1) * self._quota)
        return size if size - end == 1 else end
