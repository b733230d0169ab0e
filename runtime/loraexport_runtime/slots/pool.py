"""Adapters in host memory and in slots, while other threads run batches. Slot 0 is the base."""

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from .fair_queue import Line
from .table import Grant, HostAdapter, SlotTable

Blocks = Mapping[str, np.ndarray]
"""One slot's rows, by stack."""


@dataclass(frozen=True)
class AdapterInfo:
    """Where a loaded adapter is."""

    slot: int | None
    """None: in host memory only; the next run that names it pages it in."""
    pinned: bool
    """It keeps a slot until it is unpinned."""
    ranks: Mapping[str, int]
    """By site."""


class Slots:
    """A run leases its slots; a load fills a slot that nobody uses, then flips the name.

    So a run sees an adapter's old weights or its new ones, never a mixture. A run takes all its
    slots at once or none of them, in the order of arrival (see `Line`), so runs that page neither
    block each other for ever nor starve.
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
        self._line = Line()
        self._changed = self._line.changed
        self._reading = threading.Lock()
        self._read = read
        self._write = write

    @property
    def loaded(self) -> dict[str, int]:
        """Adapter name -> slot, of those that sit in one now."""
        with self._changed:
            return dict(self._table.slots)

    def listing(self) -> dict[str, AdapterInfo]:
        """Every adapter that a run may name, as of now."""
        with self._changed:
            table = self._table
            return {
                name: AdapterInfo(table.slots.get(name), name in table.pinned, adapter.ranks)
                for name, adapter in table.adapters.items()
            }

    def snapshot(self) -> dict[str, tuple[int, Blocks]]:
        """What the slots hold, each adapter whole: name -> slot and blocks."""
        with self._changed:
            found = {}
            for name, slot in self._table.slots.items():
                blocks = self._table.adapters[name].blocks
                assert blocks is not None, f"{name} sits in a slot, so it was read"
                found[name] = (slot, blocks)
            return found

    @contextmanager
    def lease(self, names: Iterable[str | None]) -> Iterator[dict[str | None, int]]:
        """Hold the slots of some adapters for one run; None is the base.

        Those in host memory are paged in, where the least recently used adapters were that no run
        holds and nobody has pinned; with none such, once the runs that hold them have ended.

        Raises:
            SlotsExceededError: more distinct adapters than slots, or than slots without a pin.
            UnknownAdapterError: an adapter is not loaded.
        """
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        with self._changed:
            unread = [name for name in wanted if self._table.is_unread(name)]
            if unread:
                self._table.check(wanted)  # ahead of reading for a run that is refused
        for name in unread:
            self._fetch(name)
        grant = self._line.wait(lambda is_first: self._table.lease(wanted, is_first))
        try:
            if grant.pages:
                self._page_in(grant)
            slots: dict[str | None, int] = {None: 0}
            slots.update(grant.slots)
            yield slots
        finally:
            self._release(grant.slots.values())

    @contextmanager
    def lease_slots(self, numbers: Iterable[int]) -> Iterator[None]:
        """Hold slots by number for one run. Raises SegmentsError: one is empty or out of range."""
        wanted = set(numbers) - {0}
        held = self._line.wait(lambda is_first: self._table.lease_numbers(wanted, is_first))
        try:
            yield
        finally:
            self._release(held)

    def fill(self, name: str, adapter: HostAdapter) -> int:
        """Put an adapter into host memory and into a slot, at once; returns the slot.

        A free slot is taken; with none, that of the loaded adapter of the same name, while runs
        that name it wait; for a new name, the least recently used one without a pin is paged out.
        If the write fails, the name means what it meant before.

        Raises:
            SlotsExceededError: every slot is kept for a pinned adapter.
        """
        assert adapter.blocks is not None, "a load has read what it loads"
        slot = self._line.wait(lambda is_first: self._table.lease_for_load(name, is_first))
        written = None
        try:
            self._write(slot, adapter.blocks)
            written = adapter
        finally:
            with self._changed:
                self._table.end_load(name, slot, written)
                self._changed.notify_all()
        return slot

    def remove(self, name: str) -> None:
        """Forget an adapter; runs that hold it finish undisturbed. Raises UnknownAdapterError."""
        with self._changed:
            self._table.forget(name)
            self._changed.notify_all()

    def pin(self, name: str) -> int:
        """Bring an adapter into a slot and keep it there; returns the slot. Raises as `lease`."""
        with self.lease([name]) as slots, self._changed:
            self._table.check([name])  # it may have been forgotten meanwhile
            self._table.pinned.add(name)
            self._changed.notify_all()
            return self._table.slots.get(name, slots[name])

    def unpin(self, name: str) -> None:
        """It may be paged out again; nothing, if it was not pinned. Raises UnknownAdapterError."""
        with self._changed:
            self._table.require(name)
            self._table.pinned.discard(name)
            self._changed.notify_all()

    def _fetch(self, name: str) -> None:
        """Read an adapter's blocks once, however many runs ask for them."""
        with self._reading:
            with self._changed:
                known = self._table.adapters.get(name)
            if known is None or known.blocks is not None:
                return  # forgotten, or read by another thread meanwhile
            read = replace(known, blocks=self._read(name))
            with self._changed:
                if self._table.adapters.get(name) is known:
                    self._table.adapters[name] = read

    def _page_in(self, grant: Grant) -> None:
        written = False
        try:
            for slot, (_, adapter) in grant.pages.items():
                assert adapter.blocks is not None, "a lease reads before it asks for slots"
                self._write(slot, adapter.blocks)
            written = True
        finally:
            with self._changed:
                self._table.end_paging(grant, written=written)
                self._changed.notify_all()

    def _release(self, slots: Collection[int]) -> None:
        with self._changed:
            self._table.release(slots)
            self._changed.notify_all()
