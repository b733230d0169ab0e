"""Threads in line for a shared state: each takes all that it needs at once, or waits with nothing.

Nobody holds one thing while waiting for another, so no two can wait for each other.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Line:
    """First come, first served, for those who need the state to change.

    `changed` guards the state; whoever changes it notifies.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._waiting: deque[object] = deque()

    def wait(self, attempt: Callable[[bool], T | None]) -> T:
        """Call `attempt(is_first)` with `changed` held, after every change, until it gives a value.

        The first in line may keep the others from what it waits for; the others may only take what
        is at hand. So the first is served once those who are ahead of it have finished, and then
        the next one is first: nobody starves.
        """
        ticket = object()
        with self.changed:
            self._waiting.append(ticket)
            try:
                while (result := attempt(self._waiting[0] is ticket)) is None:
                    self.changed.wait()
                return result
            finally:  # also when it is interrupted or refused
                self._waiting.remove(ticket)
                self.changed.notify_all()
