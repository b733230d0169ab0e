"""Waits that end: who gives up leaves the line as if it had never stood there."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import write_adapter
from support.waiting import DEADLINE, num_waiting, wait_until, weights

import loraexport_runtime as lr
from loraexport_runtime.slots.fair_queue import Deadline, deadline_of
from loraexport_runtime.slots.pool import Blocks, Slots
from loraexport_runtime.slots.table import HostAdapter

NAMES = ("a", "b", "c", "d")
SOON = 0.02


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture
def slots() -> Slots:
    """Two slots with a and b; c and d are in host memory."""
    adapters = {name: weights(index + 1) for index, name in enumerate(NAMES)}
    return Slots(2, {"a": 1, "b": 2}, adapters, lambda name: {}, lambda slot, blocks: None)


def use(slots: Slots, names: str, timeout: float | None = None) -> list[int]:
    with slots.lease(names, timeout) as held:
        return [held[name] for name in names]


@pytest.mark.parametrize("timeout", [0, SOON])
@pytest.mark.parametrize("call", ["lease", "pin", "fill", "fill again"])
def test_nothing_changes(slots: Slots, call: str, timeout: float) -> None:
    text = rf"no slot within {timeout:g} seconds for '(c|new|a)': other runs hold them; nothing has"
    with slots.lease("ab"):
        before, counts = slots.listing(), slots.counts()
        calls: dict[str, Callable[[], object]] = {
            "lease": lambda: use(slots, "c", timeout),
            "pin": lambda: slots.pin("c", timeout),
            "fill": lambda: slots.fill("new", weights(9), timeout),
            "fill again": lambda: slots.fill("a", weights(9), timeout),
        }
        with pytest.raises(lr.SlotTimeoutError, match=text) as caught:
            calls[call]()
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, lr.BatchError)
        assert slots.listing() == before
        after = slots.counts()
        assert (after.pages, after.evictions) == (counts.pages, counts.evictions) == (0, 0)
        assert after.waits == counts.waits + 1
        assert (after.wait_seconds > counts.wait_seconds) or not timeout
        with slots.lease("ab") as held:
            assert held == {None: 0, "a": 1, "b": 2}, "no slot is kept for who gave up"
        with slots.lease_slots([1, 2]):
            pass
    assert use(slots, "cd", SOON) == [1, 2]
    assert num_waiting(slots) == 0


def test_slots_by_number(slots: Slots, pool: ThreadPoolExecutor) -> None:
    with slots.lease("ab"):
        waiting = pool.submit(use, slots, "cd")
        wait_until(lambda: num_waiting(slots) == 1)
        with pytest.raises(lr.SlotTimeoutError, match=r"no slot within 0\.02 seconds for 1, 2:"):
            slots.lease_slots([1, 2], SOON).__enter__()
    assert waiting.result(DEADLINE) == [1, 2]


def test_others_behind_who_gave_up_are_served(
    slots: Slots, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first in line keeps slots for itself; once it gives up, they are everybody's."""
    is_late = threading.Event()
    monkeypatch.setattr(Deadline, "remaining", lambda self: 0.0 if is_late.is_set() else SOON)
    with slots.lease("a"):
        with slots.lease("b"):
            first = pool.submit(use, slots, "cd", 1)
            wait_until(lambda: num_waiting(slots) == 1)
            second = pool.submit(use, slots, "b")
            third = pool.submit(use, slots, "d")
            wait_until(lambda: num_waiting(slots) == 3)
        time.sleep(2 * SOON)
        assert not any(one.done() for one in (first, second, third)), "the first one keeps b's slot"
        is_late.set()
        with pytest.raises(lr.SlotTimeoutError):
            first.result(DEADLINE)
        # a is in use still: both are served by the other slot.
        assert second.result(DEADLINE) == [2]
        assert third.result(DEADLINE) == [2]


def test_who_is_served_in_time_sees_no_error(slots: Slots, pool: ThreadPoolExecutor) -> None:
    with slots.lease("ab"):
        waiting = pool.submit(use, slots, "cd", DEADLINE)
        wait_until(lambda: num_waiting(slots) == 1)
    assert waiting.result(DEADLINE) == [1, 2]


def test_many_give_up_while_others_come(slots: Slots, pool: ThreadPoolExecutor) -> None:
    """Nobody is forgotten, whoever leaves the line ahead of whom."""

    def work(at: int) -> int:
        served = 0
        for turn in range(40):
            pair = ("ab", "cd", "ac", "bd")[(at + turn) % 4]
            timeout = (None, 0, 0.001, 0.004)[(at * 7 + turn) % 4]
            try:
                with slots.lease(pair, timeout):
                    time.sleep(0.0005)
                    served += 1
            except lr.SlotTimeoutError:
                assert timeout is not None
        return served

    served = [one.result(4 * DEADLINE) for one in [pool.submit(work, at) for at in range(8)]]
    assert sum(served) >= 8 * 10, "a quarter of them wait as long as it takes"
    assert slots.counts().runs == sum(served)
    assert num_waiting(slots) == 0
    assert use(slots, "cd", 0) == use(slots, "cd", 0)


def test_a_slow_read_of_another_thread(pool: ThreadPoolExecutor) -> None:
    """An adapter that the artifact carries is read by one thread at a time."""
    reading, go = threading.Event(), threading.Event()

    def read(name: str) -> Blocks:
        reading.set()
        assert go.wait(DEADLINE)
        return {"stack": np.array([3.0])}

    unread = HostAdapter({"site": 1}, None, "", 1.0, None)
    slots = Slots(1, {}, {"c": unread}, read, lambda slot, blocks: None)
    first = pool.submit(use, slots, "c")
    assert reading.wait(DEADLINE)
    with pytest.raises(lr.SlotTimeoutError, match=r"no slot within 0\.02 seconds for 'c'"):
        use(slots, "c", SOON)
    go.set()
    assert first.result(DEADLINE) == [1]


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "1", True, [1]])
def test_what_a_timeout_must_be(slots: Slots, timeout: Any) -> None:
    for call in (
        lambda: use(slots, "a", timeout),
        lambda: slots.pin("a", timeout),
        lambda: slots.fill("a", weights(9), timeout),
        lambda: slots.lease_slots([1], timeout).__enter__(),
    ):
        with pytest.raises(
            lr.InputError, match=r"timeout is .*; expected seconds, 0 or more, or N"
        ):
            call()


def test_a_timeout_longer_than_any_lock_takes() -> None:
    deadline = deadline_of(1e300)
    assert deadline is not None
    assert deadline.remaining() == threading.TIMEOUT_MAX


def test_a_session_passes_it_on(tenants: Path, tmp_path: Path) -> None:
    session = lr.load_layers(tenants, threads=1)
    layer, x = session["up"], np.zeros((2, 32), np.float32)
    fresh = write_adapter(tmp_path / "fresh", {"blocks.0.up": (32, 48)})
    with session._host.slots.lease(["sql", "chat"]):
        for call in (
            lambda: layer.run(x, segments=[("spare", 2)], timeout=SOON),
            lambda: session.pin("spare", timeout=SOON),
            lambda: session.load_adapter("fresh", fresh, timeout=SOON),
        ):
            with pytest.raises(lr.SlotTimeoutError, match=r"no slot within 0\.02 seconds for '"):
                call()
        assert session.adapters == {"sql": 1, "chat": 2}
        indptr, numbers = np.array([0, 2]), np.array([1])
        layer.run(x, seg_indptr=indptr, seg_slots=numbers, timeout=0)
    assert set(session.list_adapters()) == {"sql", "chat", "spare"}
    assert layer.run(x, segments=[("spare", 2)], timeout=0).shape == (2, 48)
