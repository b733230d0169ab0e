"""A slot held for as long as a request needs it, taken without waiting."""

import pytest
from support.waiting import weights

import loraexport_runtime as lr
from loraexport_runtime.slots.pool import Blocks, Slots


def make(num_slots: int, loaded: dict[str, int], names: str = "abc") -> tuple[Slots, list[int]]:
    writes: list[int] = []

    def write(slot: int, blocks: Blocks) -> None:
        writes.append(slot)

    def read(name: str) -> Blocks:
        raise AssertionError(name)

    adapters = {name: weights(float(at)) for at, name in enumerate(names)}
    return Slots(num_slots, loaded, adapters, read, write), writes


def test_a_lease_keeps_its_slot() -> None:
    slots, writes = make(1, {"a": 1})
    first = slots.try_lease("a", may_page=True, condemn=False)
    second = slots.try_lease("a", may_page=True, condemn=False)
    assert first is not None
    assert second is not None
    assert (first.slot, first.content, writes) == (1, ("digest 0.0", 1.0), [])
    for lease in (first, second):
        assert slots.try_lease("b", may_page=True, condemn=False) is None
        lease.release()
        lease.release()
    paged = slots.try_lease("b", may_page=True, condemn=False)
    assert paged is not None
    assert (paged.slot, paged.content, writes) == (1, ("digest 1.0", 1.0), [1])


def test_the_base_needs_no_slot() -> None:
    slots, _ = make(1, {"a": 1})
    held = slots.try_lease("a", may_page=True, condemn=False)
    base = slots.try_lease(None, may_page=False, condemn=False)
    assert held is not None
    assert base is not None
    assert (base.slot, base.content) == (0, None)
    base.release()


def test_what_is_not_there_for_all_to_have() -> None:
    slots, writes = make(1, {"a": 1})
    assert slots.try_lease("b", may_page=False, condemn=False) is None  # not in a slot
    slots.pin("a")
    with pytest.raises(lr.SlotsExceededError, match="1 of 1 slots are kept for pinned adapters"):
        slots.try_lease("b", may_page=True, condemn=False)
    with pytest.raises(lr.UnknownAdapterError, match="adapter 'x' is not loaded"):
        slots.try_lease("x", may_page=True, condemn=False)
    assert writes == []


def test_whoever_has_waited_long_keeps_others_out() -> None:
    slots, _ = make(1, {"a": 1})
    running = slots.try_lease("a", may_page=True, condemn=False)
    assert running is not None
    assert slots.try_lease("b", may_page=True, condemn=False) is None
    polite = slots.try_lease("a", may_page=True, condemn=False)
    assert polite is not None, "nobody was kept out"
    polite.release()
    assert slots.try_lease("b", may_page=True, condemn=True) is None
    assert slots.try_lease("a", may_page=False, condemn=False) is None
    running.release()
    aged = slots.try_lease("b", may_page=True, condemn=True)
    assert aged is not None
    assert aged.slot == 1


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failing_page_in_takes_nothing(kind: type[BaseException]) -> None:
    def fail(slot: int, blocks: Blocks) -> None:
        raise kind("the device is gone")

    slots = Slots(1, {"a": 1}, {"a": weights(1.0), "b": weights(2.0)}, lambda name: {}, fail)
    with pytest.raises(kind, match="the device is gone"):
        slots.try_lease("b", may_page=True, condemn=False)
    assert slots._table._claims == set()


def test_listeners_hear_of_every_change() -> None:
    slots, _ = make(1, {"a": 1})
    heard: list[int] = []
    slots.listen(lambda: heard.append(1))
    lease = slots.try_lease("a", may_page=True, condemn=False)
    assert lease is not None
    assert slots.try_lease("b", may_page=True, condemn=False) is None
    assert heard == []
    lease.release()
    assert heard == [1]
    slots.pin("a")
    slots.unpin("a")
    slots.remove("a")
    assert len(heard) > 3
