"""Threads in line for a shared state: each takes all that it needs at once, or waits with nothing.

Nobody holds one thing while waiting for another, so no two can wait for each other.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError, SlotTimeoutError

T = TypeVar("T")


@dataclass(frozen=True)
class Deadline:
    """When a wait has been long enough."""

    seconds: float
    """As it was asked for, for the error's text."""
    end: float
    """As `time.monotonic` tells it."""

    def remaining(self) -> float:
        """Seconds from now on, 0 or more."""
        return max(0.0, min(self.end - time.monotonic(), threading.TIMEOUT_MAX))

    def error(self, subjects: Iterable[object]) -> SlotTimeoutError:
        """The error of a wait for slots for these adapters, or of these numbers."""
        return SlotTimeoutError(
            f"no slot within {self.seconds:g} seconds for {', '.join(map(repr, subjects))}: other"
            " runs hold them; nothing has changed. Try again, wait longer, or build with more slots"
        )


def deadline_of(timeout: Any) -> Deadline | None:
    """The end of a wait of so many seconds; None: it has none. Raises InputError."""
    if timeout is None:
        return None
    is_number = isinstance(timeout, int | float | np.number) and not isinstance(timeout, bool)
    if not is_number or not 0 <= timeout < float("inf"):
        raise InputError(f"timeout is {timeout!r}; expected seconds, 0 or more, or None")
    return Deadline(float(timeout), time.monotonic() + float(timeout))


class _Ticket:
    """A place in the line. Its signal is a lock that is open while there is something to look at.

    Not a Condition: an interrupt in the midst of its `wait` leaves the queue's lock in doubt.
    """

    def __init__(self) -> None:
        self.signal = threading.Lock()
        self.start: float | None = None
        """When it was not served at once, by `time.monotonic`."""


class FairQueue:
    """First come, first served, for those who need the state to change.

    `lock` guards the state; whoever changes it calls `notify`.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.num_waits = 0
        """How many were not served at once."""
        self.seconds = 0.0
        """How long they waited, all together."""
        self.listeners: list[Callable[[], None]] = []
        """Called after every change, with `lock` held: they must not wait."""
        self._waiting: deque[_Ticket] = deque()

    @property
    def is_empty(self) -> bool:
        """Whether nobody is in line. Hold `lock`."""
        return not self._waiting

    def wait(
        self,
        attempt: Callable[[bool], T | None],
        subjects: Iterable[object],
        deadline: Deadline | None = None,
    ) -> T:
        """Call `attempt(is_first)` with `lock` held, after every change, until it gives a value.

        The first in line may keep the others from what it waits for; the others may only take what
        is at hand. So the first is served once those who are ahead of it have finished, and then
        the next one is first: nobody starves. Who gives up leaves the line as if it had never
        stood there.

        Args:
            subjects: the adapters or slots that this is for, named where the deadline passes.

        Raises:
            SlotTimeoutError: the deadline has passed.
        """
        with self.lock:
            if not self._waiting and (result := attempt(True)) is not None:
                return result  # most do not wait
        ticket = _Ticket()
        with in_the_end(lambda: self._leave(ticket)):  # also when it is interrupted or refused
            return self._wait(ticket, attempt, subjects, deadline)

    def notify(self) -> None:
        """Let those in line look at the state again. Hold `lock`."""
        for ticket in self._waiting:
            if ticket.signal.locked():
                ticket.signal.release()
        for listener in self.listeners:
            listener()

    def _wait(
        self,
        ticket: _Ticket,
        attempt: Callable[[bool], T | None],
        subjects: Iterable[object],
        deadline: Deadline | None,
    ) -> T:
        with self.lock:
            self._waiting.append(ticket)
        try:
            while True:
                ticket.signal.acquire(blocking=False)  # what changes from here on is news
                with self.lock:
                    if (result := attempt(self._waiting[0] is ticket)) is not None:
                        return result
                    if ticket.start is None:
                        ticket.start = time.monotonic()
                        self.num_waits += 1
                remaining = -1.0 if deadline is None else deadline.remaining()
                if deadline is not None and remaining == 0:
                    raise deadline.error(subjects)
                ticket.signal.acquire(timeout=remaining)
        finally:
            if ticket.start is not None:
                with self.lock:
                    self.seconds += time.monotonic() - ticket.start

    def _leave(self, ticket: _Ticket) -> None:
        with self.lock:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
            self.notify()


@contextmanager
def in_the_end(action: Callable[[], None]) -> Iterator[None]:
    """Do what may be done twice: an interrupt may come ahead of the first time, or inside of it."""
    try:
        try:
            yield
        finally:
            action()
    finally:
        action()
