"""The thread that owns a decoder's session: it admits requests, reads prompts and makes steps.

One round: who was cancelled goes; who waits and finds a row and a slot is admitted; prompts are
read, as many tokens as the quota; a few steps give every row that decodes a token each. So neither
prompts nor steps wait for more than one part of the other. On a device a second thread tells the
tokens of one run as the next one goes on.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from ...errors import ClosedError
from ...slots.admission import AdmissionQueue
from ...slots.pool import Slots
from ..stats import GenerationCounts
from ..steps.runner import Runner
from .admitting import Admission, is_over, why_over
from .choosing import choose_from, prompt_tokens, take_likeliest
from .decoding import Decoding
from .jobs import Answer, step_error
from .places import Places
from .reading import PromptOrder
from .rows import Row, Rows

_LOG = logging.getLogger(__name__)
STEPS, FEWEST = 4, 2
"""Steps of a round, and of one in which somebody comes for whom there is a row."""
HELD, SHARE = 24, 6
"""So many steps a free row waits at most for others, until they are this part of all rows."""


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
        joined = runner.prompts.joined_tokens if runner.is_remote else None
        self._prompts = PromptOrder(self._rows, quota, joined)
        self._decoding = Decoding(runner, self._rows, self._places, self._admission)
        self._held_from: int | None = None
        """The count of steps from which on free rows wait for others."""
        self._news = self._admission.news
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
            with self._runner.using():
                self._decoding.tell()
        except BaseException as fault:
            _LOG.exception("the thread that generates has ended")
            self.fault, error = fault, fault
        finally:
            self._is_stopping = True
            self._admission.refuse(error)
            for row in self._rows.used:
                self._decoding.leave(row, error=error)
            _set(*(done for _, done in self._warm))
            self._decoding.close()
            self._runner.release()

    def _wait(self) -> None:
        if not self._rows.used:
            end = self._admission.next_end()
            self._news.wait(None if end is None else max(0.0, end - time.monotonic()))
        self._news.clear()

    def _round(self) -> None:
        while self._warm:
            num, done = self._warm.pop(0)
            self._decoding.tell()
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
            if self._is_stopping or not self._decoding.step():
                break
            if made >= FEWEST and self._news.is_set() and self._is_called():
                break

    # Who goes, and who comes

    def _drop(self) -> None:
        """Who was cancelled, and whose time is over."""
        now = time.monotonic()
        if not self._admission.drop(now, at_once=not self._rows.used):
            return
        over = [row for row in self._rows.used if row.user and is_over(row.user, now)]
        if over:
            self._decoding.tell()
        for row in over:
            if row.user is not None:  # or it has ended with its last token
                self._decoding.leave(row, *why_over(row.user))

    def _is_called(self) -> bool:
        """Whether there is something to do between steps."""
        if self._admission.cancels.is_set():
            return True
        has_room = self._rows.lowest_free() is not None and self._admission.num_waiting > 0
        return has_room and not self._holds_back()

    def _holds_back(self) -> bool:
        """Whether the rows that are free wait for some more: where more requests wait than there
        are such rows, and their prompts are read together."""
        num, free = len(self._rows.rows), len(self._rows.rows) - self.num_running
        saves = self._runner.is_remote and 0 < free < num // SHARE
        if not saves or self._admission.num_waiting <= free:
            self._held_from = None
            return False
        if self._held_from is None:
            self._held_from = self.counts.steps
        return self.counts.steps - self._held_from < HELD

    def _admit(self) -> None:
        if self._holds_back():
            return
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

    # Prompts

    def _read(self, rows: Sequence[Row[Answer]]) -> None:
        """One chunk of one prompt, or some short prompts."""
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
            indices = [row.index for row in rows]
            beside = self._decoding.telling()
            read = self._runner.read(indices, chunks, uses, past, wholes, reports, beside)
        except Exception as error:
            for row in rows:
                self._decoding.leave(row, error=step_error(error))
            return
        self._decoding.check()
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
            self._decoding.begin(row, told)
