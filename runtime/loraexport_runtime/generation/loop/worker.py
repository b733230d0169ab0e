"""The thread that owns a decoder's session: it admits requests, reads prompts and makes steps.

One round: who was cancelled goes; who waits and finds a row and a slot is admitted; prompts are
read, as many tokens as the quota; a few steps give every row that decodes a token each. So neither
prompts nor steps wait for more than one part of the other.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ...errors import ClosedError, StepError
from ...slots.admission import AdmissionQueue
from ...slots.pool import Slots
from ..handle import FinishReason, GeneratedToken
from ..stats import GenerationCounts
from ..steps.runner import Runner
from .admitting import Admission, is_over, why_over
from .choosing import Chosen, choose, choose_from, prompt_tokens, take_likeliest
from .jobs import Answer, step_error
from .places import Places
from .reading import PromptOrder
from .rows import Row, Rows

_LOG = logging.getLogger(__name__)
STEPS, FEWEST = 4, 2
"""Steps of a round, and of one in which somebody comes for whom there is a row."""


def _set(*events: threading.Event) -> None:
    for event in events:
        event.set()


class Worker:
    """Rows, queue and session; `run` is its thread's whole life."""

    def __init__(
        self,
        runner: Runner,
        slots: Slots,
        queue: AdmissionQueue[Answer],
        quota: int,
        closed: str,
    ) -> None:
        """
        Args:
            quota: tokens of a prompt that a round reads at most.
            closed: what is said to those whose answers are not done when it is stopped.
        """
        self.counts = GenerationCounts()
        self._runner = runner
        self._admission = Admission(queue, slots, self.counts)
        self._closed = closed
        self._rows = Rows[Answer].make(runner.rows, runner.length)
        self._places = Places(runner, self._rows)
        self._prompts = PromptOrder(self._rows, quota, runner.joins_prompts)
        self._news = threading.Event()
        self._is_stopping = False
        self.fault: BaseException | None = None
        """Why the thread has ended by itself."""
        self._order = 0
        self._warm: list[tuple[int, threading.Event]] = []
        slots.listen(self._news.set)
        self.wake: Callable[[], None] = self._news.set
        self.on_cancel: Callable[[], None] = partial(_set, self._admission.cancels, self._news)
        """It holds nothing of the worker: a handle may outlive it."""

    # What other threads call

    @property
    def num_running(self) -> int:
        """Answers in rows now."""
        return len(self._rows.used)

    def stop(self) -> None:
        """End the thread; what is not done is refused."""
        self._is_stopping = True
        self._news.set()

    def warm_up(self, rows: int) -> None:
        """Prepare the steps of so many rows, and wait for it."""
        done = threading.Event()
        self._warm.append((rows, done))
        self._news.set()
        if self._is_stopping:  # the thread may not look at it any more
            done.set()
        done.wait()

    # The thread

    def run(self) -> None:
        """Work until `stop`."""
        error: BaseException = ClosedError(self._closed)
        try:
            while not self._is_stopping:
                self._wait()
                with self._runner.using():
                    self._round()
        except BaseException as fault:
            _LOG.exception("the thread that generates has ended")
            self.fault, error = fault, fault
        finally:
            self._is_stopping = True
            self._admission.refuse(error)
            for row in self._rows.used:
                self._leave(row, error=error)
            _set(*(done for _, done in self._warm))
            self._runner.release()

    def _wait(self) -> None:
        if not self._rows.used:
            end = self._admission.next_end()
            self._news.wait(None if end is None else max(0.0, end - time.monotonic()))
        self._news.clear()

    def _round(self) -> None:
        while self._warm:
            num, done = self._warm.pop(0)
            try:
                self._places.warm_up(num)
            finally:
                done.set()
        self._drop()
        self._admit()
        for rows in self._prompts.round():
            self._read(rows)
            if self._is_stopping:
                return
        for made in range(1, STEPS + 1):
            if self._is_stopping or not self._step():
                break
            has_room = made >= FEWEST and self._rows.lowest_free() is not None
            if has_room and self._news.is_set() and self._admission.num_waiting:
                break

    # Who goes, and who comes

    def _drop(self) -> None:
        """Who was cancelled, and whose time is over."""
        now = time.monotonic()
        self._admission.drop(now, at_once=not self._rows.used)
        for row in self._rows.used:
            if row.user is not None and is_over(row.user, now):
                self._leave(row, *why_over(row.user))

    def _admit(self) -> None:
        while (row := self._rows.lowest_free()) is not None:
            answer = self._admission.take()
            if answer is None:
                return
            self._place(answer, row)

    def _place(self, answer: Answer, row: Row[Answer]) -> None:
        """Give an answer a row."""
        job = answer.job
        assert job.lease is not None, "it was admitted"
        answer.reports = job.request.prompt_logprobs is not None and not job.is_reported
        job.is_reported |= answer.reports
        # Who asks what the model thinks of a prompt has all of it read.
        num = self._places.take(row, job.prompt, job.lease.content, may_reuse=not answer.reports)
        row.user = answer
        self._order += 1
        answer.order = self._order
        if answer.index == 0:
            job.handle.note_prompt(num)
        self.counts.prefix_hits += num > 0
        self.counts.prefix_tokens += num
        self.counts.prompt_tokens += len(job.prompt)

    def _leave(
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
        self._news.set()  # who waits for a row may have this one
        if not self._is_stopping:
            self._places.park(row)
        self._admission.close(answer, reason, error)

    # Prompts

    def _read(self, rows: Sequence[Row[Answer]]) -> None:
        """One chunk of one prompt, or some short prompts of neighbouring rows."""
        chunks, uses, wholes = [], [], []
        for row in rows:
            answer = row.user
            assert answer is not None, "it has a prompt"
            assert answer.job.lease is not None, "it was admitted"
            chunks.append(answer.prompt[row.num_read : self._prompts.chunk_end(row)])
            uses.append(answer.job.lease.use)
            wholes.append(len(answer.prompt))
        past, reports = rows[0].num_read, any(row.user and row.user.reports for row in rows)
        try:
            read = self._runner.read(rows[0].index, chunks, uses, past, wholes, reports)
        except Exception as error:
            for row in rows:
                self._leave(row, error=step_error(error))
            return
        self.counts.chunks += 1
        for at, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            answer = row.user
            assert answer is not None, "it has a prompt"
            row.num_read += len(chunk)
            row.num_touched = max(row.num_touched, past + max(map(len, chunks)))
            if answer.reports:
                logits = read.logits(read.places(at))
                answer.job.handle.push_prompt(prompt_tokens(answer, past, logits))
            if row.num_read < len(answer.prompt):
                self._places.park(row)
                continue
            if answer.takes_likeliest:
                told = take_likeliest(answer, int(read.likeliest[at]))
            else:
                told = choose_from(answer, read.logits(read.places(at)[-1:])[0])
            if self._accept(row, told):
                self._go_on(row)

    # Steps

    def _step(self) -> bool:
        """One token of every row that decodes; False: there is none."""
        self._places.read_outgrown()
        rows = [row for row in self._rows.used if row.user is not None and row.user.goes_on]
        if not rows:
            return False
        try:
            num = self._places.prepare(rows[-1].index + 1)
            self._runner.step(num)
        except Exception as error:
            for row in rows:
                self._leave(row, error=step_error(error))
            return False
        self.counts.steps += 1
        self.counts.step_rows += len(rows)
        for row in rows:
            row.num_read += 1
            row.num_touched = max(row.num_touched, row.num_read + 1)
        tokens = self._runner.inputs.tokens(num)
        others = []
        for row in rows:
            answer = row.user
            assert answer is not None, "it decodes"
            if answer.takes_likeliest:
                self._accept(row, take_likeliest(answer, int(tokens[row.index])))
            else:
                others.append(row)
        pairs = [(row.index, row.user) for row in others if row.user]
        for row, told in zip(others, choose(self._runner, pairs), strict=True):
            tokens[row.index] = told.token if isinstance(told, GeneratedToken) else 0
            self._accept(row, told)
        if others:
            self._runner.inputs.put_tokens(np.maximum(tokens, 0))  # of rows that are left too
        return True

    def _accept(self, row: Row[Answer], told: Chosen) -> bool:
        """A row's next token is known, or why there is none; whether the row goes on."""
        answer = row.user
        assert answer is not None, "it decodes"
        if not isinstance(told, GeneratedToken):
            self._leave(row, error=told)
            return False
        job, token = answer.job, told.token
        if token in answer.ends:
            self._leave(row, "stop")
            return False
        answer.num_tokens += 1
        is_over = answer.sampler.note(token)
        self.counts.generated_tokens += 1
        job.handle.push(told)
        if answer.text is not None:
            answer.text.push(token)
            is_over |= answer.text.stopped is not None
        if is_over:
            self._leave(row, "stop")
        elif answer.num_tokens >= job.request.max_tokens:
            self._leave(row, "length")
        else:
            row.tokens[row.num_read] = token
            return True
        return False

    def _go_on(self, row: Row[Answer]) -> None:
        """A row's prompt and first token are there: from here on steps give the next ones."""
        answer = row.user
        assert answer is not None, "it decodes"
        assert answer.job.lease is not None, "it was admitted"
        self._places.go_on(row, answer.job.lease.use)
        answer.goes_on = True
