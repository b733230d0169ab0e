"""A queue of requests -> the next batch: who is first by turn, and who goes well beside."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..slots.admission import AdmissionQueue
from ..slots.fair_queue import Deadline
from .joint import Joint, Part
from .stats import BatchCounts


class BatchFuture(Future[Any]):
    """What a request will give."""

    began: float | None = None
    """When its batch began, by `time.monotonic`; None: it waits."""


@dataclass(eq=False)
class Request:
    """One that waits."""

    part: Part
    names: frozenset[str]
    future: BatchFuture
    deadline: Deadline | None


def gather(
    queue: AdmissionQueue[Request],
    joint: Joint,
    counts: BatchCounts,
    most_rows: int,
    most_tokens: int,
) -> list[Request]:
    """Who is first by turn, and those of like length that fit beside; none if nobody waits.

    A request needs (its adapters, its length) of the queue. `counts` is told who was cancelled.
    """

    def take(
        fits: Callable[[Request], bool], among: Callable[[Any], bool] | None = None
    ) -> Request | None:
        while True:
            request = queue.take(lambda one, may_page, is_aged: fits(one), among)
            if request is None or request.future.set_running_or_notify_cancel():
                return request
            counts.cancelled += 1

    first = take(lambda _: True)
    if first is None:
        return []
    batch, names = [first], first.names
    others = queue.values(lambda request: request.part.length)
    low, high = joint.spread(first.part, others, most_rows, most_tokens)

    def fits(request: Request) -> bool:
        lengths = [member.part.length for member in batch] + [request.part.length]
        return (
            len(names | request.names) <= joint.num_slots and joint.padded(lengths) <= most_tokens
        )

    def is_alike(resource: Any) -> bool:
        return bool(low <= resource[1] <= high)

    while len(batch) < most_rows and (request := take(fits, is_alike)) is not None:
        batch.append(request)
        names |= request.names
    return batch


def fail(request: Request, error: BaseException) -> None:
    """Give it an error, unless it was cancelled."""
    if request.future.set_running_or_notify_cancel():
        request.future.set_exception(error)
