"""Which adapter sits in which slot, who uses it, and which slot is given away next.

Plain state without threads: `pool.py` guards it. Slot 0 is the base.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import SegmentsError, SlotsExceededError, UnknownAdapterError

_MAX_NAMES = 16


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """An adapter in host memory, as the rows that fill a slot."""

    ranks: Mapping[str, int]
    """By site."""
    blocks: Mapping[str, np.ndarray] | None
    """By stack, in the graph's dtype; None: the artifact carries it, nobody has read it yet."""
    digest: str
    """sha256 over the two files that define it."""
    scale: float
    """Multiplies its scaling."""
    path: Path | None
    """Where it was read, as it was given; None: the artifact carries it."""


@dataclass(frozen=True)
class Grant:
    """The slots of one run, all of them in use from now on."""

    slots: dict[str, int]
    pages: dict[int, tuple[str, HostAdapter]]
    """Slots that the run has to fill first."""
    evicted: dict[int, str]
    """Whom these slots belonged to, where they did."""


class SlotTable:
    """Every known adapter, and the slots that some of them own.

    A slot is *condemned* while the first in line waits for the runs in it: no other run enters.
    """

    def __init__(
        self, num_slots: int, loaded: Mapping[str, int], adapters: Mapping[str, HostAdapter]
    ) -> None:
        self.num_slots = num_slots
        self.adapters = dict(adapters)
        self.slots = dict(loaded)
        self.generations = dict.fromkeys(adapters, 1)
        """By name; each load gives the next number, whatever its name, so none comes twice."""
        self.num_hits = self.num_pages = self.num_evictions = 0
        self._last_generation = 1
        self.pinned: set[str] = set()
        self._writing: dict[int, str] = {}
        self._condemned: set[int] = set()
        self._in_use: Counter[int] = Counter()
        self._last_use: Counter[int] = Counter()
        self._clock = 0

    def check(self, wanted: Collection[str]) -> None:
        """Raise what no waiting would mend.

        Raises:
            SlotsExceededError: more distinct adapters than slots, or than slots without a pin.
            UnknownAdapterError: an adapter is not loaded.
        """
        if len(wanted) > self.num_slots:
            raise SlotsExceededError(
                f"the batch names {len(wanted)} adapters, but there are {self.num_slots} slots;"
                " split the batch, or build with more slots"
            )
        unknown = [name for name in wanted if name not in self.adapters]
        if unknown:
            name = min(unknown)
            raise UnknownAdapterError(
                f"adapter {name!r} is not loaded; loaded are {self.names()}."
                f" Load it with load_adapter({name!r})"
            )
        others = [name for name in wanted if name not in self.pinned]
        if len(others) > self.num_slots - len(self.pinned):
            raise SlotsExceededError(
                f"not enough slots for {_listed(others)}: {len(self.pinned)} of"
                f" {self.num_slots} slots are kept for the pinned {_listed(sorted(self.pinned))};"
                " unpin or unload one of those, split the batch, or build with more slots"
            )

    def lease(self, wanted: Collection[str], is_first: bool) -> Grant | None:
        """All slots that a run needs, or None: nothing is taken yet. Raises as `check` does.

        A run whose adapters are all in slots enters at once. The first in line may page others out.
        """
        self.check(wanted)
        if is_first:
            self._condemned.clear()
        if all(self._is_ready(name) for name in wanted):
            missing: list[str] = []
        elif not is_first or set(wanted) & set(self._writing.values()):
            return None
        else:
            missing = [name for name in wanted if name not in self.slots]
        chosen = self._choose(len(missing), wanted) if missing else []
        if chosen is None:
            return None
        pages, evicted = {}, {}
        for slot, name in zip(chosen, missing, strict=True):
            if (owner := self._take(slot, name)) is not None:
                evicted[slot] = owner
            pages[slot] = (name, self.adapters[name])
        hits = {name: self.slots[name] for name in wanted if name not in missing}
        for slot in hits.values():
            self._use(slot)
        self.num_hits += len(hits)
        self.num_pages += len(pages)
        slots = hits | {name: slot for slot, (name, _) in pages.items()}
        return Grant(slots, pages, evicted)

    def lease_numbers(self, numbers: Collection[int], is_first: bool) -> Collection[int] | None:
        """The same by slot number. Raises SegmentsError: one is empty or out of range."""
        if is_first:
            self._condemned.clear()
        for slot in sorted(numbers):
            if not 0 <= slot <= self.num_slots:
                raise SegmentsError(
                    f"seg_slots: slot {slot} is out of range; this artifact has slots 0 (the"
                    f" base) to {self.num_slots}"
                )
        if any(slot in self._writing or slot in self._condemned for slot in numbers):
            return None
        empty = sorted(set(numbers) - set(self.slots.values()))
        if empty:
            raise SegmentsError(
                f"seg_slots: slot {empty[0]} holds no adapter; loaded are"
                f" {self.names()}. Load one, or name adapters in segments"
            )
        for slot in numbers:
            self._use(slot)
        self.num_hits += len(numbers)
        return numbers

    def lease_for_load(self, name: str, is_first: bool) -> tuple[int, str | None] | None:
        """The slot that a load may write, and who left it, or None: wait.

        Raises SlotsExceededError: all are pinned.

        A free slot that no run uses; else the adapter's own; else that of another one.
        """
        if not is_first:
            return None
        self._condemned.clear()
        if name in self._writing.values():
            return None
        if name in self.slots:
            own = self.slots[name]
            unused = (one for one in self._free() if not self._in_use[one])
            slot = next(unused, own)
            if self._in_use[slot]:
                self._condemned = {own}
                return None
        else:
            if name not in self.pinned and len(self.pinned) == self.num_slots:
                raise SlotsExceededError(
                    f"no slot can be freed for {name!r}: all {self.num_slots} are kept for the"
                    f" pinned {_listed(sorted(self.pinned))}; unpin or unload one of those, or"
                    " build with more slots"
                )
            chosen = self._choose(1, ())
            if chosen is None:
                return None
            slot = chosen[0]
        return slot, self._take(slot, name)

    def end_paging(self, grant: Grant, *, written: bool) -> None:
        """The names point to the slots that their run has filled, unless they have changed."""
        for slot, (name, adapter) in grant.pages.items():
            del self._writing[slot]
            if written and self.adapters.get(name) is adapter:
                self.slots[name] = slot

    def end_load(self, name: str, slot: int, adapter: HostAdapter | None) -> None:
        """The name flips to the new adapter; None: the write failed, the old one still counts."""
        del self._writing[slot]
        self.release([slot])
        if adapter is not None:
            self.adapters[name], self.slots[name] = adapter, slot
            self._last_generation += 1
            self.generations[name] = self._last_generation
        elif self.slots.get(name) == slot:
            del self.slots[name]  # half-written

    def release(self, slots: Iterable[int]) -> None:
        for slot in slots:
            self._in_use[slot] -= 1

    def forget(self, name: str) -> None:
        """Raises UnknownAdapterError."""
        self.require(name)
        del self.adapters[name], self.generations[name]
        self.slots.pop(name, None)
        self.pinned.discard(name)

    def require(self, name: str) -> None:
        """Raises UnknownAdapterError."""
        if name not in self.adapters:
            raise UnknownAdapterError(f"adapter {name!r} is not loaded; loaded are {self.names()}")

    def names(self) -> str:
        known = [
            f"{name!r} (slot {self.slots[name]})" if name in self.slots else f"{name!r} (no slot)"
            for name in sorted(self.adapters, key=lambda one: one not in self.slots)
        ]
        more = f", … ({len(known)} in all)" if len(known) > _MAX_NAMES else ""
        return (", ".join(known[:_MAX_NAMES]) + more) or "none"

    def is_unread(self, name: str) -> bool:
        """The artifact carries it, but nobody has read it yet."""
        known = self.adapters.get(name)
        return known is not None and known.blocks is None

    def _is_ready(self, name: str) -> bool:
        slot = self.slots.get(name)
        return slot is not None and slot not in self._writing and slot not in self._condemned

    def _free(self) -> list[int]:
        taken = {*self.slots.values(), *self._writing}
        return [slot for slot in range(1, self.num_slots + 1) if slot not in taken]

    def _choose(self, count: int, keep: Collection[str]) -> list[int] | None:
        """The slots to give away: unused before used, free before owned, then least recently used.

        None: some are still used, and condemned now. None of them is pinned or owned by `keep`.
        """
        kept = {self.slots[name] for name in (*keep, *self.pinned) if name in self.slots}
        owned = set(self.slots.values())
        candidates = sorted(
            {*range(1, self.num_slots + 1)} - kept - set(self._writing),
            key=lambda slot: (self._in_use[slot] > 0, slot in owned, self._last_use[slot], slot),
        )
        chosen = candidates[:count]
        if len(chosen) < count or any(self._in_use[slot] for slot in chosen):
            self._condemned = set(chosen)
            return None
        return chosen

    def _take(self, slot: int, name: str) -> str | None:
        """Page out whom the slot belongs to, which is given; `name` is being written there."""
        owner = next((one for one, where in self.slots.items() if where == slot), name)
        if owner != name:
            del self.slots[owner]
            self.num_evictions += 1
        self._writing[slot] = name
        self._use(slot)
        return None if owner == name else owner

    def _use(self, slot: int) -> None:
        self._clock += 1
        self._in_use[slot] += 1
        self._last_use[slot] = self._clock


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names)
