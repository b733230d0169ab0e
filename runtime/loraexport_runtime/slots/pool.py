"""Adapters in host memory and in slots, while other threads run batches. Slot 0 is the base."""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np

from .batch import RowAdapters, row_names
from .fair_queue import Deadline, FairQueue, deadline_of, in_the_end
from .info import AdapterInfo, SlotCounts
from .lease import BASE_USE, Lease, use_of
from .table import Claim, Grant, HostAdapter, SlotTable

_LOG = logging.getLogger(__name__)
Blocks = Mapping[str, np.ndarray]
"""One slot's rows, by stack."""


class Slots:
    """A run leases its slots; a load fills a slot that nobody uses, then flips the name.

    So a run sees an adapter's old weights or its new ones, never a mixture. A run takes all its
    slots at once or none of them, in the order of arrival (see `FairQueue`), so runs that page
    neither block each other for ever nor starve. What it holds is noted in its claim, and given
    back wherever an exception comes from, also one of another thread or of a signal.
    """

    def __init__(
        self,
        num_slots: int,
        loaded: Mapping[str, int],
        adapters: Mapping[str, HostAdapter],
        read: Callable[[str], Blocks],
        write: Callable[[int, Blocks], None],
    ) -> None:
        """
        Args:
            loaded: the adapters that sit in slots from the start.
            adapters: every adapter that a run may name.
            read: gives an adapter's blocks where `adapters` has none yet.
            write: fills a slot.
        """
        self._table = SlotTable(num_slots, loaded, adapters)
        self._queue = FairQueue()
        self._lock = self._queue.lock
        self._reading = threading.RLock()  # which tells who holds it
        self._read = read
        self._write = write
        self._num_runs = 0
        self._run_seconds = 0.0

    @property
    def loaded(self) -> dict[str, int]:
        """Adapter name -> slot, of those that sit in one now."""
        with self._lock:
            return dict(self._table.slots)

    def is_read(self, name: str) -> bool | None:
        """Whether an adapter is in host memory, so that a run reads no file; None: not loaded."""
        with self._lock:
            adapter = self._table.adapters.get(name)
            return None if adapter is None else adapter.blocks is not None

    def listen(self, listener: Callable[[], None]) -> None:
        """Call it after every change of slots, in any thread; it must not wait."""
        self._queue.listeners.append(listener)

    def listing(self) -> dict[str, AdapterInfo]:
        """Every adapter that a run may name, as of now."""
        with self._lock:
            return {name: AdapterInfo.of(self._table, name) for name in self._table.adapters}

    def counts(self) -> SlotCounts:
        """As of now, all of one moment."""
        with self._lock:
            table, queue = self._table, self._queue
            return SlotCounts(
                len(table.slots),
                table.num_hits,
                table.num_pages,
                table.num_evictions,
                queue.num_waits,
                queue.seconds,
                self._num_runs,
                self._run_seconds,
            )

    def snapshot(self) -> dict[str, tuple[int, Blocks]]:
        """What the slots hold, each adapter whole: name -> slot and blocks."""
        with self._lock:
            contents = {}
            for name, slot in self._table.slots.items():
                blocks = self._table.adapters[name].blocks
                assert blocks is not None, f"{name} sits in a slot, so it was read"
                contents[name] = (slot, blocks)
            return contents

    @contextmanager
    def lease(
        self, names: Iterable[str | None], timeout: float | None = None, *, is_run: bool = True
    ) -> Iterator[dict[str | None, int]]:
        """Hold the slots of some adapters for one run; None is the base.

        Those in host memory are paged in, where the least recently used adapters were that no run
        holds and nobody has pinned; with none such, once the runs that hold them have ended.

        Args:
            timeout: seconds to wait for slots; None: as long as it takes.
            is_run: it is counted as one.

        Raises:
            SlotsExceededError: more distinct adapters than slots, or than slots without a pin.
            SlotTimeoutError: they were not free in time; nothing has changed.
            UnknownAdapterError: an adapter is not loaded.
            InputError: timeout is no number of seconds.
        """
        deadline = deadline_of(timeout)
        requested = [name for name in dict.fromkeys(names) if name is not None]
        with self._lock:
            unread = [name for name in requested if self._table.is_unread(name)]
            if unread:
                self._table.check(requested)  # ahead of reading for a run that is refused
        for name in unread:
            self._fetch(name, deadline)
        claim = Claim()
        with in_the_end(lambda: self._give_back(claim)):
            grant = self._queue.wait(
                lambda is_first: self._table.lease(claim, requested, is_first), requested, deadline
            )
            claim.start = time.perf_counter() if is_run else None
            if grant.pages:
                self._page_in(claim, grant)
            slots: dict[str | None, int] = {None: 0}
            slots.update(grant.slots)
            yield slots

    def read(self, row: RowAdapters) -> None:
        """Have what a row uses in host memory, so that no lease reads files. Raises as `lease`."""
        with self._lock:
            self._table.check(names := row_names([row]))
        for name in names:
            if self._table.is_unread(name):
                self._fetch(name, None)

    def try_lease(self, row: RowAdapters, *, may_page: bool, condemn: bool) -> Lease | None:
        """Hold the slots of what a row uses until they are released; None: not to be had now.

        Args:
            may_page: others may have to leave their slots for it, unless some wait in line.
            condemn: without success, nobody enters the slots any more that it is going to get.

        Raises SlotsExceededError: too many are pinned, or there are; UnknownAdapterError.
        """
        claim, names = Claim(), row_names([row])
        if not names:
            return Lease(BASE_USE, None, lambda: None)
        try:
            self.read(row)
            with self._lock:
                may_page = may_page and self._queue.is_empty
                grant = self._table.lease(claim, names, may_page)
                if grant is None:
                    if may_page and not condemn:
                        self._table.pardon()
                    return None
                claim.start = time.perf_counter()
                use, content = use_of(row, grant.slots, self._table.adapters)
            if grant.pages:
                self._page_in(claim, grant)
        except BaseException:
            self._give_back(claim)
            raise
        return Lease(use, content, lambda: self._give_back(claim))

    @contextmanager
    def lease_slots(self, numbers: Iterable[int], timeout: float | None = None) -> Iterator[None]:
        """Hold slots by number for one run.

        Raises:
            SegmentsError: one is empty or out of range.
            SlotTimeoutError: one was given away and not free again in time.
            InputError: timeout is no number of seconds.
        """
        requested, claim = set(numbers) - {0}, Claim()
        with in_the_end(lambda: self._give_back(claim)):
            self._queue.wait(
                lambda is_first: self._table.lease_numbers(claim, requested, is_first),
                requested,
                deadline_of(timeout),
            )
            claim.start = time.perf_counter()
            yield

    def fill(self, name: str, adapter: HostAdapter, timeout: float | None = None) -> int:
        """Put an adapter into host memory and into a slot, at once; returns the slot.

        A free slot is taken; with none, that of the loaded adapter of the same name, while runs
        that name it wait; for a new name, the least recently used one without a pin is paged out.
        If the write fails, the name means what it meant before.

        Raises:
            SlotsExceededError: every slot is kept for a pinned adapter.
            SlotTimeoutError: none was free in time; nothing has changed.
            InputError: timeout is no number of seconds.
        """
        assert adapter.blocks is not None, "a load has read what it loads"
        claim = Claim()
        with in_the_end(lambda: self._give_back(claim)):
            slot, evicted = self._queue.wait(
                lambda is_first: self._table.lease_for_load(claim, name, is_first),
                [name],
                deadline_of(timeout),
            )
            if evicted is not None:
                _LOG.debug("adapter %r leaves slot %d for %r", evicted, slot, name)
            self._write(slot, adapter.blocks)
            with self._lock:
                self._table.end_load(claim, name, slot, adapter)
            return slot

    def remove(self, name: str) -> None:
        """Forget an adapter; runs that hold it finish undisturbed. Raises UnknownAdapterError."""
        with self._lock:
            self._table.forget(name)
            self._queue.notify()

    def pin(self, name: str, timeout: float | None = None) -> int:
        """Bring an adapter into a slot and keep it there; returns the slot. Raises as `lease`."""
        with self.lease([name], timeout, is_run=False) as slots, self._lock:
            self._table.check([name])  # it may have been forgotten meanwhile
            self._table.pinned.add(name)
            self._queue.notify()
            return self._table.slots.get(name, slots[name])

    def unpin(self, name: str) -> None:
        """It may be paged out again; nothing, if it was not pinned. Raises UnknownAdapterError."""
        with self._lock:
            self._table.require(name)
            self._table.pinned.discard(name)
            self._queue.notify()

    def clear(self) -> None:
        """Forget every adapter, as nobody will run again."""
        with self._lock:
            for name in list(self._table.adapters):
                self._table.forget(name)

    def _fetch(self, name: str, deadline: Deadline | None) -> None:
        """Read an adapter's blocks once, however many runs ask for them."""
        remaining = -1.0 if deadline is None else deadline.remaining()
        with in_the_end(self._end_reading):
            if not self._reading.acquire(timeout=remaining):
                assert deadline is not None, "without one it waits"
                raise deadline.error([name])
            with self._lock:
                adapter = self._table.adapters.get(name)
            if adapter is None or adapter.blocks is not None:
                return  # forgotten, or read by another thread meanwhile
            read = replace(adapter, blocks=self._read(name))
            with self._lock:
                if self._table.adapters.get(name) is adapter:
                    self._table.adapters[name] = read

    def _end_reading(self) -> None:
        with suppress(RuntimeError):  # another thread holds it, or nobody any more
            self._reading.release()

    def _page_in(self, claim: Claim, grant: Grant) -> None:
        for slot, (name, adapter) in grant.pages.items():
            assert adapter.blocks is not None, "a lease reads before it asks for slots"
            self._write(slot, adapter.blocks)
            left = grant.evicted.get(slot)
            _LOG.debug("adapter %r paged into slot %d, which %r leaves", name, slot, left)
        with self._lock:
            self._table.end_paging(claim, grant)
            self._queue.notify()

    def _give_back(self, claim: Claim) -> None:
        with self._lock:
            self._table.give_back(claim)
            start, claim.start = claim.start, None
            if start is not None:
                self._num_runs += 1
                self._run_seconds += time.perf_counter() - start
            self._queue.notify()
