"""Slots under threads: a run sees an adapter's old weights or its new ones, never a mixture."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import write_adapter

import loraexport_runtime as lr
from loraexport_runtime.devices import StackBuffer
from loraexport_runtime.slots import Slots

DEADLINE = 30.0
"""Seconds after which a thread that should have moved counts as stuck."""


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def ignore(slot: int) -> None:
    """A write that writes nothing."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads run until the condition holds; fail if it never does."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "no thread brought this about"
        time.sleep(0.001)


def num_waiting(slots: Slots) -> int:
    """Threads that sit in one of its waits."""
    return len(slots._changed._waiters)  # type: ignore[attr-defined]


class TestFill:
    def test_takes_the_first_free_slot(self) -> None:
        slots = Slots(3, {"b": 2})
        written: list[int] = []
        assert slots.fill("a", written.append) == 1
        assert slots.fill("c", written.append) == 3
        assert written == [1, 3]
        assert slots.loaded == {"b": 2, "a": 1, "c": 3}

    def test_the_name_flips_after_the_write(self) -> None:
        slots = Slots(2, {})
        seen: list[dict[str, int]] = []
        slots.fill("a", lambda slot: seen.append(slots.loaded))
        assert seen == [{}]

    def test_replace_with_a_free_slot_flips(self) -> None:
        slots = Slots(2, {"a": 1})
        with slots.lease(["a"]) as held:
            assert slots.fill("a", ignore) == 2, "it need not wait for the run"
            assert held == {None: 0, "a": 1}
            with slots.lease(["a"]) as later:
                assert later == {None: 0, "a": 2}
        assert slots.fill("b", ignore) == 1

    def test_a_left_slot_is_not_taken_while_a_run_uses_it(self, pool: ThreadPoolExecutor) -> None:
        slots = Slots(2, {"a": 1, "b": 2})
        written: list[int] = []
        with slots.lease(["b"]):
            slots.remove("b")
            with pytest.raises(lr.UnknownAdapterError), slots.lease(["b"]):
                pass
            filling = pool.submit(slots.fill, "c", written.append)
            wait_until(lambda: num_waiting(slots) == 1)
            assert written == []
        assert filling.result(DEADLINE) == 2
        assert written == [2]

    def test_the_idle_one_of_two_left_slots_is_taken(self) -> None:
        slots = Slots(2, {"a": 1, "b": 2})
        with slots.lease(["a"]):
            slots.remove("a")
            slots.remove("b")
            assert slots.fill("c", ignore) == 2

    def test_no_slot_is_free(self) -> None:
        slots = Slots(2, {"a": 1, "b": 2})
        text = (
            r"no slot is free for 'c': all 2 are taken by 'a' \(slot 1\), 'b' \(slot 2\);"
            " unload one first, or build with more slots"
        )
        with pytest.raises(lr.SlotsExceededError, match=text):
            slots.fill("c", ignore)
        assert slots.loaded == {"a": 1, "b": 2}


class TestReplaceInPlace:
    """Every slot is owned, so the new weights go where the old ones are."""

    def test_waits_for_runs_and_holds_back_its_own_name_only(
        self, pool: ThreadPoolExecutor
    ) -> None:
        slots = Slots(2, {"a": 1, "b": 2})
        events: list[str] = []

        def run(name: str) -> None:
            with slots.lease([name, None]):
                events.append(f"run {name}")

        def run_slot(number: int) -> None:
            with slots.lease_slots([number, 0]):
                events.append(f"run slot {number}")

        with slots.lease(["a"]):
            filling = pool.submit(slots.fill, "a", lambda slot: events.append(f"write {slot}"))
            wait_until(lambda: num_waiting(slots) == 1)
            pool.submit(run, "b").result(DEADLINE)
            pool.submit(run_slot, 2).result(DEADLINE)
            blocked = [pool.submit(run, "a"), pool.submit(run_slot, 1)]
            wait_until(lambda: num_waiting(slots) == 3)
            assert events == ["run b", "run slot 2"]
            events.append("end of the old run")
        assert filling.result(DEADLINE) == 1
        for future in blocked:
            future.result(DEADLINE)
        assert events[2:4] == ["end of the old run", "write 1"]
        assert sorted(events[4:]) == ["run a", "run slot 1"]
        assert slots.loaded == {"a": 1, "b": 2}

    def test_nobody_gets_in_during_the_write(self, pool: ThreadPoolExecutor) -> None:
        slots = Slots(1, {"a": 1})
        entered: list[Future[None]] = []

        def run() -> None:
            with slots.lease(["a"]):
                pass

        def write(slot: int) -> None:
            entered.append(pool.submit(run))
            wait_until(lambda: num_waiting(slots) == 1)
            assert not entered[0].done()

        slots.fill("a", write)
        entered[0].result(DEADLINE)

    def test_a_failing_write_leaves_no_half_written_name(self) -> None:
        slots = Slots(2, {"a": 1, "b": 2})

        def fail(slot: int) -> None:
            raise OSError("the device is gone")

        with pytest.raises(OSError, match="the device is gone"):
            slots.fill("a", fail)
        assert slots.loaded == {"b": 2}
        with pytest.raises(lr.UnknownAdapterError), slots.lease(["a"]):
            pass
        assert slots.fill("a", ignore) == 1

    def test_a_failing_write_to_a_free_slot_keeps_the_old_one(self) -> None:
        slots = Slots(2, {"a": 1})

        def fail(slot: int) -> None:
            raise OSError("the device is gone")

        with pytest.raises(OSError, match="the device is gone"):
            slots.fill("a", fail)
        assert slots.loaded == {"a": 1}
        with slots.lease(["a"]) as held:
            assert held["a"] == 1

    def test_an_interrupted_wait_lets_the_name_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slots = Slots(1, {"a": 1})

        def interrupt(condition: Callable[[], bool]) -> bool:
            assert not condition()
            raise KeyboardInterrupt

        with slots.lease(["a"]):
            with monkeypatch.context() as patched:
                patched.setattr(slots._changed, "wait_for", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    slots.fill("a", ignore)
            assert slots._replacing is None, "or the next run would wait for ever"
            with slots.lease(["a"]) as held:
                assert held["a"] == 1
        assert slots.fill("a", ignore) == 1


class TestLease:
    def test_unload_while_in_use(self) -> None:
        slots = Slots(1, {"a": 1})
        with slots.lease(["a", "a", None]) as held:
            slots.remove("a")
            assert held == {None: 0, "a": 1}
            assert slots.loaded == {}
        text = r"adapter 'a' is not loaded; loaded are none. Load it with load_adapter\('a'\)"
        with pytest.raises(lr.UnknownAdapterError, match=text), slots.lease(["a"]):
            pass

    def test_a_failing_run_gives_its_slots_back(self, pool: ThreadPoolExecutor) -> None:
        slots = Slots(1, {"a": 1})
        with pytest.raises(RuntimeError, match="the run failed"), slots.lease(["a"]):
            raise RuntimeError("the run failed")
        with pytest.raises(RuntimeError, match="the run failed"), slots.lease_slots([1, 1]):
            raise RuntimeError("the run failed")
        assert pool.submit(slots.fill, "a", ignore).result(DEADLINE) == 1

    def test_a_refused_lease_holds_nothing(self, pool: ThreadPoolExecutor) -> None:
        slots = Slots(2, {"a": 1, "b": 2})
        with pytest.raises(lr.UnknownAdapterError), slots.lease(["a", "nobody"]):
            pass
        with pytest.raises(lr.SegmentsError), slots.lease_slots([1, 3]):
            pass
        assert pool.submit(slots.fill, "a", ignore).result(DEADLINE) == 1

    def test_more_names_than_slots(self) -> None:
        slots = Slots(1, {"a": 1})
        text = "the batch names 2 adapters, but there are 1 slots; split the batch, or build with"
        with pytest.raises(lr.SlotsExceededError, match=text), slots.lease(["a", None, "b"]):
            pass

    @pytest.mark.parametrize("number", [-1, 3])
    def test_number_out_of_range(self, number: int) -> None:
        slots = Slots(2, {"a": 1})
        text = rf"slot {number} is out of range; this artifact has slots 0 \(the base\) to 2"
        with pytest.raises(lr.SegmentsError, match=text), slots.lease_slots([1, number]):
            pass

    def test_number_without_adapter(self) -> None:
        slots = Slots(2, {"a": 1})
        text = r"slot 2 holds no adapter; loaded are 'a' \(slot 1\). Load one, or name adapters"
        with pytest.raises(lr.SegmentsError, match=text), slots.lease_slots([0, 2]):
            pass

    def test_remove_what_is_not_there(self) -> None:
        text = r"adapter 'b' is not loaded; loaded are 'a' \(slot 1\)"
        with pytest.raises(lr.UnknownAdapterError, match=text):
            Slots(2, {"a": 1}).remove("b")


def test_hammer(
    tenants: Path, tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both slots are taken; one thread replaces `sql` again and again while seven run it."""
    sites = {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "blocks.0.up": (32, 48)}
    folders = [write_adapter(tmp_path / str(seed), sites, rank=8, seed=seed) for seed in (11, 12)]
    session = lr.load(tenants, threads=1)
    x = np.random.default_rng(0).standard_normal((7, 32)).astype(np.float32)
    segments = [("sql", 2), ("chat", 2), ("sql", 3)]
    seg_indptr, seg_slots = np.array([0, 2, 4, 7]), np.array([1, 2, 1])

    allowed: dict[str, set[bytes]] = {"qkv": set(), "up": set()}
    for folder in folders:
        session.load_adapter("sql", folder)
        for layer, outputs in allowed.items():
            outputs.add(session[layer].run(x, segments=segments).tobytes())
    assert all(len(outputs) == 2 for outputs in allowed.values())

    write = StackBuffer.write

    def write_row_by_row(buffer: StackBuffer, slot: int, block: np.ndarray) -> None:
        half = np.concatenate([block[: len(block) // 2], np.full_like(block, 7.0)])[: len(block)]
        write(buffer, slot, half)
        time.sleep(0)  # offers the others a look at half an adapter
        write(buffer, slot, block)

    monkeypatch.setattr(StackBuffer, "write", write_row_by_row)
    finished = threading.Event()

    def replace(count: int) -> None:
        try:
            for index in range(count):
                assert session.load_adapter("sql", folders[index % 2]) == 1
        finally:
            finished.set()

    def run(index: int) -> int:
        layer = ("qkv", "up")[index % 2]
        wrong = runs = 0
        while runs < 20 or (runs < 5000 and not finished.is_set()):
            if index < 4:
                y = session[layer].run(x, segments=segments)
            else:
                y = session[layer].run(x, seg_indptr=seg_indptr, seg_slots=seg_slots)
            wrong += y.tobytes() not in allowed[layer]
            runs += 1
        return wrong

    runners = [pool.submit(run, index) for index in range(7)]
    pool.submit(replace, 60).result(DEADLINE)
    assert [runner.result(DEADLINE) for runner in runners] == [0] * 7
    assert session.adapters == {"sql": 1, "chat": 2}
