"""Who is inside of something that can be closed: calls that have begun end, later ones are refused.

Close waits for the calls inside, those too that wait for a slot: each of them is served in the end.
An interrupt at any line leaves nobody counted who is not inside.
"""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count

from ..errors import ClosedError

_forks = count()
_fork = next(_forks)
"""Of how many forks this process is the child."""


def _note_fork() -> None:
    global _fork
    _fork = next(_forks)


os.register_at_fork(after_in_child=_note_fork)


class Gate:
    """`with gate.entry(), gate:` around every call, and `close`, after which nobody gets in.

    Who is inside holds a lock of its thread's own. Python takes and opens it in C, where no
    interrupt comes between: a number that was counted up and down could stay too large for ever.

    In the child of a fork nobody gets in: the threads that would do the work stayed with the
    parent, and a lock that one of them held stays locked.

    Safe to use from threads. A call must not close what it is inside of: it would go on without.
    """

    def __init__(self, subject: str, how: str) -> None:
        """`subject` was closed, and `how` to open it again, for the error's text."""
        self._subject = subject
        self._how = how
        self._entries: dict[int, AbstractContextManager[bool]] = {}
        """By thread; a thread that begins may have the number of one that has ended."""
        self._closed = False
        self._closing = threading.RLock()
        self._is_given_up = False
        self._fork = _fork

    def entry(self) -> AbstractContextManager[bool]:
        """What this thread holds while it is inside; it is not inside yet. Raises as `check`."""
        self.check()
        thread = threading.get_ident()
        return self._entries.get(thread) or self._entries.setdefault(thread, threading.RLock())

    def __enter__(self) -> None:
        self.check()  # once the entry is held, for which `close` waits

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def is_closed(self) -> bool:
        return self._closed

    def check(self) -> None:
        """Raise ClosedError once it is closed, and in the child of a fork."""
        self.check_process()
        if self._closed:
            raise ClosedError(f"{self._subject} is closed; {self._how}")

    @property
    def is_forked(self) -> bool:
        """Whether this process is the child of a fork."""
        return self._fork != _fork

    def check_process(self) -> None:
        """Raise ClosedError in the child of a fork."""
        if self.is_forked:
            raise ClosedError(
                f"{self._subject} is of the process that this one was forked from, whose threads"
                f" are not here; {self._how} in this process, or start processes by spawn"
            )

    def close(self, give_up: Callable[[], None]) -> None:
        """Let nobody in, wait until nobody is inside, then give up what was used there, once.

        Where an interrupt ends the wait or `give_up`, the next close goes on: what `give_up` does
        may be done again. In the child of a fork it does nothing, as the parent's memory and
        threads are not the child's to give up.
        """
        if self.is_forked:
            return
        self._closed = True
        for entry in list(self._entries.values()):
            with entry:
                pass
        with self._closing:
            if not self._is_given_up:
                give_up()
                self._is_given_up = True
