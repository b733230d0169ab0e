"""The device, used by many threads of the process, or by the one that captures a CUDA graph.

While onnxruntime captures, CUDA refuses copies that wait and new memory to every thread of the
process, and whoever asks for them spoils the capture too. CUDA's relaxed mode for the other threads
is not enough: onnxruntime waits for the whole device, which spoils it as well.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Captures:
    """Uses that stand beside each other, and captures that stand alone.

    A thread may take both within a use of its own. One that waits for its first use may hold
    nothing that another waits for within one, as a capture waits for all uses to end.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._uses: dict[int, int] = {}
        """How many each thread holds."""
        self._num_waiting = 0
        self._capturer: int | None = None

    @contextmanager
    def use(self) -> Iterator[None]:
        """Hold a use, once nobody captures or waits to."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._uses and me != self._capturer:
                self._changed.wait_for(lambda: self._capturer is None and not self._num_waiting)
            self._uses[me] = self._uses.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._uses[me] -= 1
                if not self._uses[me]:
                    del self._uses[me]
                    self._changed.notify_all()

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Stand alone, once no other thread holds a use; this thread's own rest meanwhile."""
        me = threading.get_ident()
        with self._changed:
            own = self._uses.pop(me, 0)
            self._num_waiting += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._capturer is None and not self._uses)
                self._capturer = me
            finally:
                self._num_waiting -= 1
                if own:
                    self._uses[me] = own
        try:
            yield
        finally:
            with self._changed:
                self._capturer = None
                self._changed.notify_all()


_CAPTURES = Captures()


def using(device: tuple[str, int]) -> AbstractContextManager[None]:
    """What is done on a device, and is no capture."""
    return nullcontext() if device[0] == "cpu" else _CAPTURES.use()


def capturing(device: tuple[str, int]) -> AbstractContextManager[None]:
    """A run that captures a CUDA graph: no other thread of the runtime uses any device then."""
    return nullcontext() if device[0] == "cpu" else _CAPTURES.capture()
