"""Which text is where in the cache, and what a step reads of every row."""

from collections.abc import Iterable

import numpy as np

from ...slots.lease import BASE_USE, Content, RowUse
from ..rope import is_long
from ..steps.runner import Runner
from .jobs import Answer
from .rows import Row, Rows


class Places:
    """The rows of a runner: a prompt gets one, with what another row has read of it already.

    The first rows are used first, as a step computes so many of them; texts that nobody uses move
    away to rows behind.
    """

    def __init__(self, runner: Runner, rows: Rows[Answer]) -> None:
        self._runner = runner
        self._rows = rows
        self._uses = [BASE_USE] * len(rows.rows)
        """Of rows that decode; the base too for those that do not."""
        self._decodes = [False] * len(rows.rows)

    def take(
        self, row: Row[Answer], prompt: np.ndarray, content: Content, *, may_reuse: bool
    ) -> int:
        """Make a row that nobody uses a prompt's; how many of its tokens are read already."""
        source, num = None, 0
        side = is_long(len(prompt), self._runner.reread_length)
        if may_reuse and not self._runner.reads_at_once(len(prompt)):
            source, num = self._rows.longest_prefix(prompt, content, side)
        if row.is_kept and row is not source:
            spare = self._rows.spare(row, source)
            if spare is not None:
                self._move(row, spare, row.num_read)
        if source is not None and source is not row:
            self._move(source, row, num)
            self._rows.touch(source)
            if source.user is None and 2 * num > source.num_read:
                source.num_read = 0  # most of it is here now
                self.park(source)
        # Another tenant's text is gone, and so is what is no number.
        self._runner.cache.clear(row.index, num, row.num_touched)
        row.content, row.num_read, row.num_touched = content, num, num
        row.is_long = side
        row.tokens[: len(prompt)] = prompt
        self._rows.touch(row)
        self.park(row)
        return num

    def forget(self, row: Row[Answer]) -> None:
        """Something is wrong with what a row holds."""
        self._runner.cache.clear(row.index, 0, min(row.end, self._runner.length))
        row.num_read = row.num_touched = 0
        row.content = None

    def outgrown(self) -> list[Row[Answer]]:
        """Rows whose text the next token makes too long for the factors that its keys were made
        with: no key of theirs is right any more."""
        size = self._runner.reread_length
        if size is None:
            return []
        going = (row for row in self._rows.used if row.user and row.user.goes_on)
        return [row for row in going if not row.is_long and is_long(row.num_read + 1, size)]

    def read_again(self, rows: Iterable[Row[Answer]]) -> None:
        """Let the text of rows that decode be a prompt, which is read with other factors."""
        for row in rows:
            answer = row.user
            assert answer is not None, "it decodes"
            answer.again = row.tokens[: row.num_read + 1].copy()
            answer.goes_on = answer.reports = False
            self._runner.cache.clear(row.index, 0, min(row.end, self._runner.length))
            row.num_read = row.num_touched = 0
            row.is_long = True
            self.park(row)

    def park(self, row: Row[Answer]) -> None:
        """Until a row decodes, a step computes the base there, at the place that is read next."""
        at = min(row.num_read, self._runner.length - 1)
        row.num_read = at
        row.num_touched = max(row.num_touched, at + 1)
        self._decodes[row.index], self._uses[row.index] = False, BASE_USE
        self._runner.inputs.put(row.index, 0, at + 1, BASE_USE, goes_on=False)

    def go_on(self, row: Row[Answer], use: RowUse) -> None:
        """From here on steps give a row's next tokens; the first one is known."""
        self._decodes[row.index], self._uses[row.index] = True, use
        token = int(row.tokens[row.num_read])
        self._runner.inputs.put(row.index, token, row.num_read + 1, use, goes_on=True)

    def prepare(self, num: int) -> int:
        """The rows of the step that holds the first `num`; captured or bound, where it is new."""
        size = self._runner.step_rows(num)
        if self._runner.has_step(size):
            return size
        first = self._rows.rows[:size]
        for row in first:  # the runs that capture shall advance nobody
            at = min(row.num_read, self._runner.length - 1)
            self._runner.inputs.put(row.index, 0, at + 1, BASE_USE, goes_on=False)
        self._runner.make_step(size)
        for row in first:
            if self._decodes[row.index]:
                self.go_on(row, self._uses[row.index])
            else:
                self.park(row)
        return size

    def warm_up(self, rows: int) -> None:
        """Prepare the steps of up to so many rows, and the graphs for prompts."""
        for num in sorted({self._runner.step_rows(1 + at) for at in range(rows)}):
            self.prepare(num)
        for shape in self._runner.prompts.shapes:
            self._runner.prompts.captured(*shape)

    def _move(self, source: Row[Answer], target: Row[Answer], num: int) -> None:
        """Copy a text's first tokens to a row that nobody uses."""
        self._runner.cache.copy(source.index, target.index, num)
        target.tokens[:num] = source.tokens[:num]
        target.num_read, target.content = num, source.content
        target.is_long = source.is_long
        target.last_use = source.last_use
        self.park(target)
