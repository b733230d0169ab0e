"""A second thread of an engine: it works while the first one waits for the device."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

Work = Callable[[], None]


class Beside:
    """A thread that does one thing at a time; the caller's next steps come after it."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._done: SimpleQueue[BaseException | None] = SimpleQueue()
        self.fault: BaseException | None = None
        """What ended a work."""
        queues = self._work, self._done
        self._thread = threading.Thread(
            target=_do, args=queues, name="loraexport-tell", daemon=True
        )
        self._thread.start()

    @contextmanager
    def doing(self, work: Work) -> Iterator[None]:
        """Do it within; at the end it is done, or there is a fault."""
        self._work.put(work)
        try:
            yield
        finally:
            self.fault = self._done.get()

    def stop(self) -> None:
        """End the thread."""
        self._work.put(None)
        self._thread.join()


def _do(works: "SimpleQueue[Work | None]", done: "SimpleQueue[BaseException | None]") -> None:
    while (work := works.get()) is not None:
        fault: BaseException | None = None
        try:
            work()
        except BaseException as error:
            fault = error
        del work  # an engine that is dropped is freed at once
        done.put(fault)
