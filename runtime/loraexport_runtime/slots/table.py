"""Which adapter sits in which slot, who uses it, and which slot is given away next.

Plain state without threads: `pool.py` guards it. Slot 0 is the base.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import SegmentsError, SlotsExceededError, UnknownAdapterError


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


@dataclass(eq=False)
class Claim:
    """What a run or a load holds, noted before it is held: giving it back needs nothing else."""

    slots: set[int] = field(default_factory=set)
    writes: dict[int, str] = field(default_factory=dict)
    """Those of the slots that are not filled yet, and for whom."""
    start: float | None = None
    """When the run began that is to be counted, by `time.perf_counter`."""


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
    An interrupt may come between any two lines, so each leaves a state that is whole once the claim
    is given back: an adapter may have lost its slot by then, but no slot its content.
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
        self._claims: set[Claim] = set()
        self._condemned: set[int] = set()
        self._last_use: Counter[int] = Counter()
        self._clock = 0

    def check(self, requested: Collection[str]) -> None:
        """Raise what no waiting would mend.

        Raises:
            SlotsExceededError: more distinct adapters than slots, or than slots without a pin.
            UnknownAdapterError: an adapter is not loaded.
        """
        if len(requested) > self.num_slots:
            raise SlotsExceededError(
                f"the batch names {len(requested)} adapters, but there are {self.num_slots} slots;"
                " split the batch, or build with more slots"
            )
        unknown = [name for name in requested if name not in self.adapters]
        if unknown:
            name = min(unknown)
            raise UnknownAdapterError(
                f"{self._not_loaded(name)}. Load it with load_adapter({name!r})"
            )
        unpinned = [name for name in requested if name not in self.pinned]
        if len(unpinned) > self.num_slots - len(self.pinned):
            raise SlotsExceededError(
                f"not enough slots for {_listed(unpinned)}: {len(self.pinned)} of"
                f" {self.num_slots} slots are kept for pinned adapters; unpin or unload one of"
                " those, split the batch, or build with more slots"
            )

    def lease(self, claim: Claim, requested: Collection[str], is_first: bool) -> Grant | None:
        """All slots that a run needs, or None: nothing is taken yet. Raises as `check` does.

        A run whose adapters are all in slots enters at once. The first in line may page others out.
        """
        self.check(requested)
        if is_first:
            self._condemned.clear()
        writing = self._writing()
        closed = writing.keys() | self._condemned
        if all(self.slots.get(name, 0) not in closed | {0} for name in requested):
            missing: list[str] = []
        elif not is_first or set(requested) & set(writing.values()):
            return None
        else:
            missing = [name for name in requested if name not in self.slots]
        chosen = self._choose(len(missing), requested) if missing else []
        if chosen is None:
            return None
        pages, evicted = {}, {}
        for slot, name in zip(chosen, missing, strict=True):
            if (owner := self._take(claim, slot, name)) is not None:
                evicted[slot] = owner
            pages[slot] = (name, self.adapters[name])
        hits = {name: self.slots[name] for name in requested if name not in missing}
        self._use(claim, hits.values())
        self.num_hits += len(hits)
        self.num_pages += len(pages)
        slots = hits | {name: slot for slot, (name, _) in pages.items()}
        return Grant(slots, pages, evicted)

    def pardon(self) -> None:
        """Nobody waits for the slots that were to become free: any run may enter them."""
        self._condemned.clear()

    def lease_numbers(self, claim: Claim, numbers: Collection[int], is_first: bool) -> bool | None:
        """The same by slot number. Raises SegmentsError: one is empty or out of range."""
        if is_first:
            self._condemned.clear()
        for slot in sorted(numbers):
            if not 0 <= slot <= self.num_slots:
                raise SegmentsError(
                    f"seg_slots: slot {slot} is out of range; this artifact has slots 0 (the"
                    f" base) to {self.num_slots}"
                )
        if not (self._writing().keys() | self._condemned).isdisjoint(numbers):
            return None
        empty = sorted(set(numbers) - set(self.slots.values()))
        if empty:
            raise SegmentsError(
                f"seg_slots: slot {empty[0]} holds no adapter: see list_adapters();"
                f" {len(self.slots)} of {self.num_slots} do. Load one, or name adapters in segments"
            )
        self._use(claim, numbers)
        self.num_hits += len(numbers)
        return True

    def lease_for_load(
        self, claim: Claim, name: str, is_first: bool
    ) -> tuple[int, str | None] | None:
        """The slot that a load may write, and who left it, or None: wait.

        Raises SlotsExceededError: all are pinned.

        A free slot that no run uses; else the adapter's own, or, while runs are in that, an idle
        one of another adapter, so that they end with the old weights; else that of another one.
        """
        if not is_first:
            return None
        self._condemned.clear()
        if name in self._writing().values():
            return None
        if name in self.slots:
            current, in_use = self.slots[name], self._in_use()
            occupied = in_use.union(self.slots.values())
            unused = (free for free in range(1, self.num_slots + 1) if free not in occupied)
            slot = next(unused, current)
            if slot in in_use:
                slot = self._idle_slot() or current
            if slot in in_use:
                self._condemned = {current}
                return None
        else:
            if name not in self.pinned and len(self.pinned) == self.num_slots:
                raise SlotsExceededError(
                    f"no slot can be freed for {name!r}: all {self.num_slots} are kept for pinned"
                    " adapters; unpin or unload one of those, or build with more slots"
                )
            chosen = self._choose(1, ())
            if chosen is None:
                return None
            slot = chosen[0]
        return slot, self._take(claim, slot, name)

    def end_paging(self, claim: Claim, grant: Grant) -> None:
        """The names point to the slots that their run has filled, unless they have changed."""
        for slot, (name, adapter) in grant.pages.items():
            if self.adapters.get(name) is adapter:
                self.slots[name] = slot
            claim.writes.pop(slot)

    def end_load(self, claim: Claim, name: str, slot: int, adapter: HostAdapter) -> None:
        """The name flips to the new adapter, whose slot is filled."""
        self.slots.pop(name, None)
        self._last_generation += 1
        self.generations[name] = self._last_generation
        self.adapters[name] = adapter
        self.slots[name] = slot
        claim.writes.pop(slot)

    def give_back(self, claim: Claim) -> None:
        """Let go of what a claim has come to hold, all or nothing of it; once or more often."""
        for slot, name in claim.writes.items():
            if self.slots.get(name) == slot:
                del self.slots[name]  # half-written; the name means the old weights in host memory
        self._claims.discard(claim)

    def forget(self, name: str) -> None:
        """Raises UnknownAdapterError."""
        self.require(name)
        self.slots.pop(name, None)
        self.pinned.discard(name)
        del self.adapters[name], self.generations[name]

    def require(self, name: str) -> None:
        """Raises UnknownAdapterError."""
        if name not in self.adapters:
            raise UnknownAdapterError(self._not_loaded(name))

    def _not_loaded(self, name: str) -> str:
        """The names of others stay out of it: the caller's tenant is not theirs."""
        return (
            f"adapter {name!r} is not loaded; {len(self.adapters)} are, {len(self.slots)} of them"
            " in slots: see list_adapters()"
        )

    def is_unread(self, name: str) -> bool:
        """The artifact carries it, but nobody has read it yet."""
        adapter = self.adapters.get(name)
        return adapter is not None and adapter.blocks is None

    def _writing(self) -> dict[int, str]:
        """The slots that are being filled, and for whom."""
        return {slot: name for claim in self._claims for slot, name in claim.writes.items()}

    def num_leases(self, slot: int) -> int:
        """How many hold a slot now."""
        return sum(slot in claim.slots for claim in self._claims)

    def _in_use(self) -> set[int]:
        return {slot for claim in self._claims for slot in claim.slots}

    def _choose(self, count: int, keep: Collection[str]) -> list[int] | None:
        """The slots to give away: unused before used, free before owned, then least recently used.

        None: some are still used, and condemned now. None of them is pinned or owned by `keep`.
        """
        protected = {self.slots[name] for name in (*keep, *self.pinned) if name in self.slots}
        owned, in_use = set(self.slots.values()), self._in_use()
        candidates = sorted(
            {*range(1, self.num_slots + 1)} - protected - self._writing().keys(),
            key=lambda slot: (slot in in_use, slot in owned, self._last_use[slot], slot),
        )
        chosen = candidates[:count]
        if len(chosen) < count or not in_use.isdisjoint(chosen):
            self._condemned = set(chosen)
            return None
        return chosen

    def _idle_slot(self) -> int | None:
        """The least recently used slot that no run is in and no pin keeps."""
        kept = {self.slots[name] for name in self.pinned if name in self.slots}
        kept |= self._in_use() | self._writing().keys()
        idle = {*range(1, self.num_slots + 1)} - kept
        return min(idle, key=lambda slot: (self._last_use[slot], slot), default=None)

    def _take(self, claim: Claim, slot: int, name: str) -> str | None:
        """Page out whom the slot belongs to, which is given; `name` is being written there."""
        self._use(claim, [slot])
        claim.writes[slot] = name
        owner = next((occupant for occupant, where in self.slots.items() if where == slot), name)
        if owner != name:
            del self.slots[owner]
            self.num_evictions += 1
        return None if owner == name else owner

    def _use(self, claim: Claim, slots: Collection[int]) -> None:
        self._claims.add(claim)
        for slot in slots:
            claim.slots.add(slot)
            self._clock += 1
            self._last_use[slot] = self._clock


def _listed(names: Collection[str]) -> str:
    return ", ".join(repr(name) for name in names)
