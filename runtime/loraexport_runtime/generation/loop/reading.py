"""Whose prompt is read next, how much of it, and which are read together."""

from collections.abc import Callable, Iterator, Sequence

from .jobs import Answer
from .rows import Row, Rows

MOST_RUNS, MOST_SINGLE_RUNS = 4, 16
"""In a round, whatever is left of the quota: on a device the shortest run launches all kernels, and
short prompts are read together; on a CPU, where each is read alone, it reads all weights."""
MOST_QUOTAS = 8
"""Of a round where more rows wait for their prompts than decode."""
PATIENCE = 4
"""So many shorter prompts may be read before a longer one that came earlier."""
LAUNCHES = 512
"""What the launches of a run on a device take, in tokens that it computes in that time (2.3 ms, and
3.9 us a token, on one H100): prompts that are filled up by less are read together."""
JoinedTokens = Callable[[int, int], int | None]
"""(prompts, tokens of the longest) -> tokens of their run, what fills them up counted too; None:
they are not read together."""


class PromptOrder:
    """The prompts in the rows of an engine, read chunk by chunk."""

    def __init__(self, rows: Rows[Answer], quota: int, joined: JoinedTokens | None) -> None:
        """
        Args:
            quota: tokens of a chunk.
            joined: of whole prompts that are read together; None: each is read alone.
        """
        self._rows = rows
        self._quota = quota
        self._joined = joined
        self._least = -(-quota // (MOST_RUNS if joined else MOST_SINGLE_RUNS))
        """What a run counts of the quota at least."""

    def round(self) -> Iterator[list[Row[Answer]]]:
        """What is read before the next steps, run by run, until the quota is used up. A run is a
        chunk of one prompt, or some prompts; it has been read when the next one is asked for."""
        left = self._quota * self._num_quotas()
        while left > 0 and (rows := self._next(left)):
            left -= self._count(rows)
            yield rows

    @property
    def waiting(self) -> list[Row[Answer]]:
        """Rows whose prompts are to be read."""
        return [row for row in self._rows.used if row.user and not row.user.goes_on]

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

        def rank(row: Row[Answer]) -> tuple[bool, int, int]:
            answer = row.user
            assert answer is not None, "it has a prompt"
            is_late = answer.num_passed >= PATIENCE
            left = 0 if is_late else len(answer.prompt) - row.num_read
            return not is_late, left, answer.order

        waiting = sorted(self.waiting, key=rank)
        if not waiting or self._count(waiting[:1]) > left < self._quota:
            return []
        rows = self._join(waiting, left)
        newest = max(row.user.order for row in rows if row.user)
        for row in waiting:
            if row.user and row not in rows and row.user.order < newest:
                row.user.num_passed += 1
        return rows

    def _join(self, waiting: Sequence[Row[Answer]], left: int) -> list[Row[Answer]]:
        """The first row, and those whose whole prompts are read with it in less time than alone."""
        rows = [waiting[0]]
        if self._joined is None or not self._is_whole(rows[0]):
            return rows
        for row in waiting[1:]:
            if not self._is_whole(row):
                continue
            one, now, then = map(self._tokens, ([row], rows, [*rows, row]))
            if one is None or now is None or then is None or then > now + LAUNCHES + one:
                continue
            if self._count([*rows, row]) <= left:
                rows.append(row)
        return rows

    def _is_whole(self, row: Row[Answer]) -> bool:
        """Whether its prompt is read from the beginning to the end in one run, and nothing more is
        asked of it."""
        answer = row.user
        assert answer is not None, "it has a prompt"
        is_whole = row.num_read == 0 and self.chunk_end(row) == len(answer.prompt)
        return is_whole and not answer.reports

    def _tokens(self, rows: Sequence[Row[Answer]]) -> int | None:
        """Of a run over whole prompts."""
        assert self._joined is not None, "prompts are read together"
        return self._joined(len(rows), max(map(self.chunk_end, rows)))

    def _count(self, rows: Sequence[Row[Answer]]) -> int:
        """What a run counts of the quota: on a device whole prompts take half as long as a chunk of
        as many tokens, of which no run is captured."""
        tokens = sum(self.chunk_end(row) - row.num_read for row in rows)
        if self._joined is not None and all(map(self._is_whole, rows)):
            tokens = (self._tokens(rows) or tokens) // 2
        return max(tokens, self._least)

    def chunk_end(self, row: Row[Answer]) -> int:
        """Chunks end at multiples of the quota, so that a prompt is cut as if it were alone; no
        single token is left, as onnxruntime's product of one row rounds otherwise on a CPU."""
        assert row.user is not None, "it has a prompt"
        size = len(row.user.prompt)
        end = min(size, (row.num_read // self._quota + 1) * self._quota)
        return size if size - end == 1 else end
