"""Adapters in host memory and in slots, while other threads run batches. Slot 0 is the base."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .fair_queue import Deadline, FairQueue, deadline_of
from .table import Grant, HostAdapter, SlotTable

_LOG = logging.getLogger(__name__)
Blocks = Mapping[str, np.ndarray]
"""One slot's rows, by stack."""


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: where it is, and where it comes from."""

    slot: int | None
    """None: in host memory only; the next run that names it pages it in."""
    pinned: bool
    """It keeps a slot until it is unpinned."""
    ranks: Mapping[str, int]
    """By site."""
    digest: str
    """sha256 over its adapter_config.json and adapter_model.safetensors, as hexadecimal text."""
    scale: float
    """What multiplies its scaling: the spec's for a carried adapter, times `load_adapter`'s."""
    path: Path | None
    """The directory as `load_adapter` was given it; None: the artifact carries it."""
    generation: int
    """1 from the start; each later load in this session has a greater number than any before it, so
    that a name's grows with each replacement, also when it was unloaded meanwhile."""


@dataclass(frozen=True)
class SlotCounts:
    """What a pool of slots has done so far; see `SessionStats`."""

    slots_held: int
    hits: int
    pages: int
    evictions: int
    waits: int
    wait_seconds: float
    runs: int
    run_seconds: float


class Slots:
    """A run leases its slots; a load fills a slot that nobody uses, then flips the name.

    So a run sees an adapter's old weights or its new ones, never a mixture. A run takes all its
    slots at once or none of them, in the order of arrival (see `FairQueue`), so runs that page
    neither block each other for ever nor starve.
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
        self._reading = threading.Lock()
        self._read = read
        self._write = write
        self._num_runs = 0
        self._run_seconds = 0.0

    @property
    def loaded(self) -> dict[str, int]:
        """Adapter name -> slot, of those that sit in one now."""
        with self._lock:
            return dict(self._table.slots)

    def listing(self) -> dict[str, AdapterInfo]:
        """Every adapter that a run may name, as of now."""
        with self._lock:
            table = self._table
            return {
                name: AdapterInfo(
                    table.slots.get(name),
                    name in table.pinned,
                    adapter.ranks,
                    adapter.digest,
                    adapter.scale,
                    adapter.path,
                    table.generations[name],
                )
                for name, adapter in table.adapters.items()
            }

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
            found = {}
            for name, slot in self._table.slots.items():
                blocks = self._table.adapters[name].blocks
                assert blocks is not None, f"{name} sits in a slot, so it was read"
                found[name] = (slot, blocks)
            return found

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
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        with self._lock:
            unread = [name for name in wanted if self._table.is_unread(name)]
            if unread:
                self._table.check(wanted)  # ahead of reading for a run that is refused
        for name in unread:
            self._fetch(name, deadline)
        grant = self._queue.wait(
            lambda is_first: self._table.lease(wanted, is_first), wanted, deadline
        )
        start = time.perf_counter()
        try:
            if grant.pages:
                self._page_in(grant)
            slots: dict[str | None, int] = {None: 0}
            slots.update(grant.slots)
            yield slots
        finally:
            self._release(grant.slots.values(), start if is_run else None)

    @contextmanager
    def lease_slots(self, numbers: Iterable[int], timeout: float | None = None) -> Iterator[None]:
        """Hold slots by number for one run.

        Raises:
            SegmentsError: one is empty or out of range.
            SlotTimeoutError: one was given away and not free again in time.
            InputError: timeout is no number of seconds.
        """
        wanted = set(numbers) - {0}
        held = self._queue.wait(
            lambda is_first: self._table.lease_numbers(wanted, is_first),
            wanted,
            deadline_of(timeout),
        )
        start = time.perf_counter()
        try:
            yield
        finally:
            self._release(held, start)

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
        slot, evicted = self._queue.wait(
            lambda is_first: self._table.lease_for_load(name, is_first),
            [name],
            deadline_of(timeout),
        )
        if evicted is not None:
            _LOG.debug("adapter %r leaves slot %d for %r", evicted, slot, name)
        written = None
        try:
            self._write(slot, adapter.blocks)
            written = adapter
        finally:
            with self._lock:
                self._table.end_load(name, slot, written)
                self._queue.notify()
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
        if not self._reading.acquire(timeout=remaining):
            assert deadline is not None, "without one it waits"
            raise deadline.error([name])
        try:
            with self._lock:
                adapter = self._table.adapters.get(name)
            if adapter is None or adapter.blocks is not None:
                return  # forgotten, or read by another thread meanwhile
            read = replace(adapter, blocks=self._read(name))
            with self._lock:
                if self._table.adapters.get(name) is adapter:
                    self._table.adapters[name] = read
        finally:
            self._reading.release()

    def _page_in(self, grant: Grant) -> None:
        written = False
        try:
            for slot, (name, adapter) in grant.pages.items():
                assert adapter.blocks is not None, "a lease reads before it asks for slots"
                self._write(slot, adapter.blocks)
                _LOG.debug(
                    "adapter %r paged into slot %d, which %r leaves",
                    name,
                    slot,
                    grant.evicted.get(slot),
                )
            written = True
        finally:
            with self._lock:
                self._table.end_paging(grant, written=written)
                self._queue.notify()

    def _release(self, slots: Collection[int], start: float | None) -> None:
        """Give slots back; `start`: of the run that ends, by `time.perf_counter`."""
        with self._lock:
            self._table.release(slots)
            if start is not None:
                self._num_runs += 1
                self._run_seconds += time.perf_counter() - start
            self._queue.notify()
