"""Who is inside of something that can be closed: calls that have begun end, later ones are refused.

Close waits for the calls inside, those too that wait for a slot: each of them is served in the end.
"""

import threading

from ..errors import ClosedError


class Gate:
    """A context manager for every call, and `close`, after which it lets nobody in.

    Safe to use from threads. A call must not close what it is inside of: it would wait for itself.
    """

    def __init__(self, what: str, how: str) -> None:
        """`what` was closed, and `how` to open it again, for the error's text."""
        self._what = what
        self._how = how
        self._lock = threading.Lock()  # entered by itself, as a Condition's own `with` takes longer
        self._changed = threading.Condition(self._lock)
        self._inside = 0
        self._closed = False

    def __enter__(self) -> None:
        with self._lock:
            if self._closed:
                self.check()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._closed:
                self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        return self._closed

    def check(self) -> None:
        """Raise ClosedError once it is closed."""
        if self._closed:
            raise ClosedError(f"{self._what} is closed; {self._how}")

    def close(self) -> bool:
        """Let nobody in, and wait until nobody is inside. True for the first who calls it."""
        with self._changed:
            is_first, self._closed = not self._closed, True
            self._changed.wait_for(lambda: self._inside == 0)
        return is_first
