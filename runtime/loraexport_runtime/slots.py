"""Which adapter sits in which slot, while other threads run batches. Slot 0 is the base."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .errors import SegmentsError, SlotsExceededError, UnknownAdapterError


class Slots:
    """Names and slots. A run leases its slots; a load fills an unused slot, then flips the name.

    So a run sees an adapter's old weights or its new ones, never a mixture.
    """

    def __init__(self, num_slots: int, loaded: dict[str, int]) -> None:
        self.num_slots = num_slots
        self._slots = dict(loaded)
        self._in_use: Counter[int] = Counter()
        self._replacing: str | None = None
        self._changed = threading.Condition()
        self._loading = threading.Lock()

    @property
    def loaded(self) -> dict[str, int]:
        """Adapter name -> slot, as of now."""
        with self._changed:
            return dict(self._slots)

    @contextmanager
    def lease(self, names: Iterable[str | None]) -> Iterator[dict[str | None, int]]:
        """Hold the slots of some adapters for one run; None is the base.

        Raises:
            SlotsExceededError: more distinct adapters than slots.
            UnknownAdapterError: an adapter is not loaded.
        """
        wanted = set(names) - {None}
        if len(wanted) > self.num_slots:
            raise SlotsExceededError(
                f"the batch names {len(wanted)} adapters, but there are {self.num_slots} slots;"
                " split the batch, or build with more slots"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._replacing not in wanted)
            unknown = sorted(str(name) for name in wanted if name not in self._slots)
            if unknown:
                raise UnknownAdapterError(
                    f"adapter {unknown[0]!r} is not loaded; loaded are {self._names()}."
                    f" Load it with load_adapter({unknown[0]!r})"
                )
            found: dict[str | None, int] = {name: self._slots[name] for name in wanted if name}
            self._in_use.update(found.values())
        try:
            yield {None: 0, **found}
        finally:
            self._release(found.values())

    @contextmanager
    def lease_slots(self, numbers: Iterable[int]) -> Iterator[None]:
        """Hold slots by number for one run. Raises SegmentsError: one is empty or out of range."""
        wanted = set(numbers) - {0}
        with self._changed:
            self._changed.wait_for(lambda: self._slots.get(self._replacing or "") not in wanted)
            filled = set(self._slots.values())
            for slot in sorted(wanted):
                if not 0 <= slot <= self.num_slots:
                    raise SegmentsError(
                        f"seg_slots: slot {slot} is out of range; this artifact has slots 0 (the"
                        f" base) to {self.num_slots}"
                    )
                if slot not in filled:
                    raise SegmentsError(
                        f"seg_slots: slot {slot} holds no adapter; loaded are"
                        f" {self._names()}. Load one, or name adapters in segments"
                    )
            self._in_use.update(wanted)
        try:
            yield
        finally:
            self._release(wanted)

    def fill(self, name: str, write: Callable[[int], None]) -> int:
        """Put an adapter into a slot: `write(slot)` fills it, then the name points to it.

        A slot that no name owns is taken, once the runs that still use it have ended; if every
        slot is owned, a loaded adapter of the same name is replaced in place, while runs that name
        it wait.

        Raises:
            SlotsExceededError: every slot is owned by another adapter.
        """
        with self._loading:
            try:
                with self._changed:
                    slot = self._reserve(name)
                self._write(name, slot, write)
            finally:  # also when the wait is interrupted: no run may wait for ever
                with self._changed:
                    self._replacing = None
                    self._changed.notify_all()
            return slot

    def remove(self, name: str) -> None:
        """Forget an adapter; runs that hold it finish undisturbed. Raises UnknownAdapterError."""
        with self._loading, self._changed:
            if name not in self._slots:
                raise UnknownAdapterError(
                    f"adapter {name!r} is not loaded; loaded are {self._names()}"
                )
            del self._slots[name]

    def _write(self, name: str, slot: int, write: Callable[[int], None]) -> None:
        try:
            write(slot)
        except BaseException:
            with self._changed:
                if self._replacing == name:
                    del self._slots[name]  # half-written: the name must not point to it
            raise
        with self._changed:
            self._slots[name] = slot

    def _reserve(self, name: str) -> int:
        owned = set(self._slots.values())
        free = [slot for slot in range(1, self.num_slots + 1) if slot not in owned]
        if free:
            self._changed.wait_for(lambda: any(not self._in_use[slot] for slot in free))
            return next(slot for slot in free if not self._in_use[slot])
        if name not in self._slots:
            raise SlotsExceededError(
                f"no slot is free for {name!r}: all {self.num_slots} are taken by"
                f" {self._names()}; unload one first, or build with more slots"
            )
        slot = self._slots[name]
        self._replacing = name
        self._changed.wait_for(lambda: not self._in_use[slot])
        return slot

    def _names(self) -> str:
        return ", ".join(f"{name!r} (slot {slot})" for name, slot in self._slots.items()) or "none"

    def _release(self, slots: Iterable[int]) -> None:
        with self._changed:
            self._in_use.subtract(slots)
            self._changed.notify_all()
