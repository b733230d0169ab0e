"""Threads in line for a shared state: each takes all that it needs at once, or waits with nothing.

Nobody holds one thing while waiting for another, so no two can wait for each other.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
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

    def error(self, what: Iterable[object]) -> SlotTimeoutError:
        """The error of a wait for slots for these adapters, or of these numbers."""
        return SlotTimeoutError(
            f"no slot within {self.seconds:g} seconds for {', '.join(map(repr, what))}: other runs"
            " hold them; nothing has changed. Try again, wait longer, or build with more slots"
        )


def deadline_of(timeout: Any) -> Deadline | None:
    """The end of a wait of so many seconds; None: it has none. Raises InputError."""
    if timeout is None:
        return None
    is_number = isinstance(timeout, int | float | np.number) and not isinstance(timeout, bool)
    if not is_number or not 0 <= timeout < float("inf"):
        raise InputError(f"timeout is {timeout!r}; expected seconds, 0 or more, or None")
    return Deadline(float(timeout), time.monotonic() + float(timeout))


class FairQueue:
    """First come, first served, for those who need the state to change.

    `lock` guards the state; whoever changes it calls `notify`.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.num_waits = 0
        """How many were not served at once."""
        self.seconds = 0.0
        """How long they waited, all together."""
        self._waiting: deque[object] = deque()

    def wait(
        self,
        attempt: Callable[[bool], T | None],
        what: Iterable[object],
        deadline: Deadline | None = None,
    ) -> T:
        """Call `attempt(is_first)` with `lock` held, after every change, until it gives a value.

        The first in line may keep the others from what it waits for; the others may only take what
        is at hand. So the first is served once those who are ahead of it have finished, and then
        the next one is first: nobody starves. Who gives up leaves the line as if it had never
        stood there.

        Args:
            what: the adapters or slots that this is for, named where the deadline passes.

        Raises:
            SlotTimeoutError: the deadline has passed.
        """
        with self.lock:
            if not self._waiting and (result := attempt(True)) is not None:
                return result  # most do not wait
            ticket = object()
            self._waiting.append(ticket)
            try:
                result = attempt(self._waiting[0] is ticket)
                if result is None:
                    result = self._wait(ticket, attempt, what, deadline)
                return result
            finally:  # also when it is interrupted or refused
                self._waiting.remove(ticket)
                self.notify()

    def notify(self) -> None:
        """Let those in line look at the state again. Hold `lock`."""
        if self._waiting:
            self.changed.notify_all()

    def _wait(
        self,
        ticket: object,
        attempt: Callable[[bool], T | None],
        what: Iterable[object],
        deadline: Deadline | None,
    ) -> T:
        start = time.monotonic()
        self.num_waits += 1
        try:
            while True:
                remaining = None if deadline is None else deadline.remaining()
                if deadline is not None and remaining == 0:
                    raise deadline.error(what)
                self.changed.wait(remaining)
                if (result := attempt(self._waiting[0] is ticket)) is not None:
                    return result
        finally:
            self.seconds += time.monotonic() - start
