"""Which answers come out of the queue, and how each of them ends."""

import threading
import time

from ...errors import RequestTimeoutError
from ...slots.admission import AdmissionQueue
from ...slots.pool import Slots
from ..handle import FinishReason
from ..stats import GenerationCounts
from .jobs import Answer

Why = tuple[FinishReason | None, BaseException | None]
"""The reason for which an answer ended, or else the error."""
_LOOK = 0.05
"""Seconds between two looks at all that wait."""


class Admission:
    """The queue of an engine, and the slots that whoever is admitted gets."""

    def __init__(
        self, queue: AdmissionQueue[Answer], slots: Slots, counts: GenerationCounts
    ) -> None:
        self._queue = queue
        self._slots = slots
        self.counts = counts
        self.cancels = threading.Event()
        """Set where somebody was cancelled."""
        self.news = threading.Event()
        """Set where a round has something else to look at: who came, went, or left room."""
        self._look = 0.0

    @property
    def num_waiting(self) -> int:
        return self._queue.sizes()[0]

    def next_end(self) -> float | None:
        """When the time of the first that wait is over, by `time.monotonic`."""
        ends = self._queue.values(lambda answer: answer.job.end)
        return min((end for end in ends if end is not None), default=None)

    def drop(self, now: float, at_once: bool) -> bool:
        """Take out who was cancelled, and whose time is over.

        Many may wait, and each is looked at: after a cancellation, and else now and then; whether
        they were now.
        """
        if not (at_once or now >= self._look or self.cancels.is_set()):
            return False
        self.cancels.clear()
        self._look = now + _LOOK
        for answer in self._queue.remove(lambda answer: is_over(answer, now)):
            self.close(answer, *why_over(answer))
        return True

    def refuse(self, error: BaseException) -> None:
        """Take all out, and say why."""
        for answer in self._queue.remove(lambda _: True):
            self.close(answer, None, error)

    def take(self) -> Answer | None:
        """The next one, its adapter's slot leased; whoever cannot have one ever is refused."""
        while (answer := self._queue.take(self._try)) is not None:
            if answer.refusal is not None:
                self.close(answer, None, answer.refusal)
            elif is_over(answer, time.monotonic()):
                self.close(answer, *why_over(answer))
            else:
                return answer
        return None

    def close(
        self, answer: Answer, reason: FinishReason | None, error: BaseException | None
    ) -> None:
        """An answer is over; with the last one of its request the slot is free."""
        job = answer.job
        self.news.set()  # who waits for a row may have its own
        job.num_open -= 1
        if job.num_open == 0 and job.lease is not None:
            job.lease.release()
        if error is not None:
            self.counts.failed += 1
            job.handle.fail(error)
        else:
            assert reason is not None, "it ends for a reason, or by an error"
            self.counts.cancelled += reason == "cancelled"
            self.counts.finished += reason != "cancelled"
            job.handle.finish(answer.index, reason)

    def _try(self, answer: Answer, may_page: bool, is_aged: bool) -> bool:
        job = answer.job
        if job.lease is not None:
            return True
        try:
            job.lease = self._slots.try_lease(
                job.request.adapter, may_page=may_page, condemn=is_aged
            )
        except Exception as error:  # it is unknown by now, all slots are pinned, a write failed
            answer.refusal = error
            return True
        return job.lease is not None


def is_over(answer: Answer, now: float) -> bool:
    """Whether an answer is to end as it is; now: by `time.monotonic`."""
    job = answer.job
    is_late = job.end is not None and job.end <= now
    return job.handle.is_cancelled or job.handle.is_done or is_late


def why_over(answer: Answer) -> Why:
    """Why such an answer ends."""
    handle, seconds = answer.job.handle, answer.job.request.timeout
    if handle.is_cancelled or seconds is None or handle.is_done:
        return "cancelled", None  # or another answer of the request has failed
    return None, RequestTimeoutError(
        f"the request was not done within {seconds:g} seconds; its tokens so far are there. Wait"
        " longer, ask for fewer tokens, or open the generator with more rows"
    )
