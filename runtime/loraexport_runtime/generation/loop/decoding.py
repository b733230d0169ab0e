"""The rows that decode: a step gives each its next token, and those of the step before are told as
the device computes it."""

from contextlib import AbstractContextManager, nullcontext

import numpy as np

from ...errors import StepError
from ..handle import FinishReason, GeneratedToken
from ..steps.next_inputs import NO_TOKEN
from ..steps.runner import Runner
from .admitting import Admission
from .beside import Beside
from .choosing import Chosen, choose, take_likeliest
from .jobs import Answer, step_error
from .places import Places
from .rows import Row, Rows


class Decoding:
    """The steps of an engine.

    On a device a step is begun before the tokens of the one before are told, and where all its rows
    take the likeliest ones before they are looked at: it has them already. Who ends with such a
    token gets one too many, which nobody is told.
    """

    def __init__(
        self,
        runner: Runner,
        rows: Rows[Answer],
        places: Places,
        admission: Admission,
    ) -> None:
        self._runner, self._rows, self._places = runner, rows, places
        self._admission, self._counts = admission, admission.counts
        self._beside = Beside() if runner.is_remote else None
        self._going: list[tuple[Row[Answer], Answer]] = []
        """Whom the last step was for, and where; another answer may have the row by now."""
        self._given: np.ndarray | None = None
        """int64 [m]: what it gave to the first rows, if that was not looked at."""
        self._untold: list[tuple[Row[Answer], Chosen]] = []
        """Or what came of it."""
        self._num_left = 0
        """So many tokens more the longest of those that go on gets, at most; 0: what a step gave is
        to be looked at before the next one."""

    def step(self) -> bool:
        """One token of every row that decodes; False: there is none."""
        if not self._knows_next() and not self._look():
            self.tell()
            return False
        try:
            num = self._places.prepare(self._going[-1][0].index + 1)
            self._runner.step(num, self.telling())
        except Exception as error:
            self.check()
            self.tell()
            for row, answer in self._going:
                if row.user is answer:
                    self.leave(row, error=step_error(error))
            return False
        if self._beside is None:
            self._given = self._runner.inputs.tokens(num)
            self.tell()
            return True
        self.check()
        self._given = self._runner.inputs.tokens(num)
        return True

    def _knows_next(self) -> bool:
        """Whether the next step is for the same rows, with what the device has left for it."""
        return self._given is not None and self._num_left > 1 and self._given.min() >= 0

    def _look(self) -> bool:
        """Find out for which rows the next step is; whether there are any."""
        self._note()
        if any(not isinstance(told, GeneratedToken) for _, told in self._untold):
            self.tell()
        if outgrown := self._places.outgrown():
            self.tell()
            self._places.read_again(row for row in outgrown if row.user is not None)
        over = {row.index for row, _ in self._untold if row.user and _num_left(row.user) <= 1}
        used = ((row, row.user) for row in self._rows.used if row.user and row.user.goes_on)
        self._going = [(row, answer) for row, answer in used if row.index not in over]
        self._num_left = self._most_left()
        return bool(self._going)

    def begin(self, row: Row[Answer], told: Chosen) -> None:
        """A row's prompt is read and its first token known: steps give the next ones."""
        answer = row.user
        assert answer is not None, "it has a prompt"
        assert answer.job.lease is not None, "it was admitted"
        if isinstance(told, GeneratedToken):
            row.tokens[row.num_read] = told.token
        if self._accept(row, told):
            self._places.go_on(row, answer.job.lease.use)
            answer.goes_on = True

    def tell(self) -> None:
        """Tell what the last step gave."""
        self._note()
        untold, self._untold = self._untold, []
        for row, told in untold:
            self._accept(row, told)
        self._num_left = self._most_left()

    def _accept(self, row: Row[Answer], told: Chosen) -> bool:
        """A row's next token is known, or why there is none; whether the row goes on."""
        answer = row.user
        assert answer is not None, "it decodes"
        if not isinstance(told, GeneratedToken):
            self.leave(row, error=told)
            return False
        job, token = answer.job, told.token
        if token in answer.ends:
            self.leave(row, "stop")
            return False
        answer.num_tokens += 1
        is_over = answer.sampler.note(token)
        self._counts.generated_tokens += 1
        job.handle.push(told)
        if answer.text is not None:
            answer.text.push(token)
            is_over |= answer.text.stopped is not None
        if is_over:
            self.leave(row, "stop")
        elif answer.num_tokens >= job.request.max_tokens:
            self.leave(row, "length")
        else:
            return True
        return False

    def leave(
        self,
        row: Row[Answer],
        reason: FinishReason | None = None,
        error: BaseException | None = None,
    ) -> None:
        """An answer is over; its row keeps what it has read, unless something is wrong with it."""
        answer, row.user = row.user, None
        assert answer is not None, "it is used"
        if isinstance(error, StepError):
            self._places.forget(row)
        self._rows.touch(row)
        self._places.park(row)
        self._admission.close(answer, reason, error)

    def telling(self) -> AbstractContextManager[None]:
        """Within it, as a run goes on, the last step's tokens are told."""
        if self._given is None and not self._untold:
            return nullcontext()
        if self._beside is None or not (self._knows_next() or self._given is None):
            self.tell()
            return nullcontext()
        return self._beside.doing(self.tell)

    def check(self) -> None:
        """Raise what has ended the telling, if it has."""
        if self._beside is not None and self._beside.fault is not None:
            raise self._beside.fault

    def close(self) -> None:
        """End what works beside."""
        if self._beside is not None:
            self._beside.stop()

    def _most_left(self) -> int:
        """Tokens that the longest of these answers still gets, at most; 0 where the graph alone
        does not give all of them."""
        answers = [answer for row, answer in self._going if row.user is answer]
        are_alike = all(answer.takes_likeliest for answer in answers)
        if self._runner.reread_length is not None or not are_alike:
            return 0
        return max(map(_num_left, answers), default=0)

    def _note(self) -> None:
        """Find out what came of the last step, of those of its rows that go on still."""
        tokens, self._given = self._given, None
        if tokens is None:
            return
        others: list[tuple[Row[Answer], Answer]] = []
        self._counts.steps += 1
        for row, answer in self._going:
            if row.user is not answer:
                continue
            self._counts.step_rows += 1
            row.num_read += 1
            if answer.takes_likeliest:
                row.tokens[row.num_read] = token = int(tokens[row.index])
                self._untold.append((row, take_likeliest(answer, token)))
            else:
                others.append((row, answer))
        if not others:
            return
        chosen = choose(self._runner, [(row.index, answer) for row, answer in others])
        for (row, _), told in zip(others, chosen, strict=True):
            token = told.token if isinstance(told, GeneratedToken) else NO_TOKEN
            tokens[row.index] = row.tokens[row.num_read] = token
            self._untold.append((row, told))
        self._runner.inputs.put_tokens(np.maximum(tokens, 0))  # of rows that are left too


def _num_left(answer: Answer) -> int:
    """Tokens that it still gets, at most."""
    return answer.job.request.max_tokens - answer.num_tokens
