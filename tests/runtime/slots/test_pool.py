"""Slots under threads: a run sees an adapter's old weights or its new ones, never a mixture.

What `test_paging.py` adds: more adapters than slots.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.adapters import write_adapter
from support.waiting import DEADLINE, num_waiting, wait_until, weights

import loraexport_runtime as lr
from loraexport_runtime.slots import fair_queue
from loraexport_runtime.slots.buffers import StackBuffer
from loraexport_runtime.slots.pool import Blocks, Slots


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def ignore(slot: int, blocks: Blocks) -> None:
    """A write that writes nothing."""


def make(
    num_slots: int, loaded: Mapping[str, int], write: Callable[[int, Blocks], None] = ignore
) -> Slots:
    def read(name: str) -> Blocks:
        raise AssertionError("every adapter here has its blocks")

    return Slots(
        num_slots, loaded, {name: weights(slot) for name, slot in loaded.items()}, read, write
    )


NEW = weights(-1)


class Writes:
    """Notes which slot was written; then does what the test asks for."""

    def __init__(self, then: Callable[[int], object] = int) -> None:
        self.slots: list[int] = []
        self.then = then

    def __call__(self, slot: int, blocks: Blocks) -> None:
        self.slots.append(slot)
        self.then(slot)


class TestFill:
    def test_takes_the_first_free_slot(self) -> None:
        writes = Writes()
        slots = make(3, {"b": 2}, writes)
        assert slots.fill("a", NEW) == 1
        assert slots.fill("c", NEW) == 3
        assert writes.slots == [1, 3]
        assert slots.loaded == {"b": 2, "a": 1, "c": 3}

    def test_the_name_flips_after_the_write(self) -> None:
        seen: list[dict[str, int]] = []
        slots = make(2, {}, lambda slot, blocks: seen.append(slots.loaded))
        slots.fill("a", NEW)
        assert seen == [{}]

    def test_replace_with_a_free_slot_flips(self) -> None:
        slots = make(2, {"a": 1})
        with slots.lease(["a"]) as held:
            assert slots.fill("a", NEW) == 2, "it need not wait for the run"
            assert held == {None: 0, "a": 1}
            with slots.lease(["a"]) as later:
                assert later == {None: 0, "a": 2}
        assert slots.fill("b", NEW) == 1

    def test_runs_keep_the_old_weights_while_a_free_slot_is_written(
        self, pool: ThreadPoolExecutor
    ) -> None:
        held: list[int] = []

        def run() -> None:
            with slots.lease(["a"]) as leased:
                held.append(leased["a"])

        slots = make(2, {"a": 1}, Writes(lambda slot: pool.submit(run).result(DEADLINE)))
        assert slots.fill("a", NEW) == 2
        assert held == [1]

    def test_a_left_slot_is_not_taken_while_a_run_uses_it(self, pool: ThreadPoolExecutor) -> None:
        writes = Writes()
        slots = make(1, {"b": 1}, writes)
        with slots.lease(["b"]):
            slots.remove("b")
            with pytest.raises(lr.UnknownAdapterError), slots.lease(["b"]):
                pass
            filling = pool.submit(slots.fill, "c", NEW)
            wait_until(lambda: num_waiting(slots) == 1)
            assert writes.slots == []
        assert filling.result(DEADLINE) == 1
        assert writes.slots == [1]

    def test_the_idle_one_of_two_left_slots_is_taken(self) -> None:
        slots = make(2, {"a": 1, "b": 2})
        with slots.lease(["a"]):
            slots.remove("a")
            slots.remove("b")
            assert slots.fill("c", NEW) == 2

    def test_loads_of_one_name_take_turns(self, pool: ThreadPoolExecutor) -> None:
        started = threading.Event()
        finish = threading.Event()

        def hold(slot: int) -> None:
            started.set()
            assert finish.wait(DEADLINE)

        slots = make(2, {}, Writes(hold))
        first = pool.submit(slots.fill, "a", weights(1))
        assert started.wait(DEADLINE)
        second = pool.submit(slots.fill, "a", weights(2))
        wait_until(lambda: num_waiting(slots) == 1)
        finish.set()
        assert (first.result(DEADLINE), second.result(DEADLINE)) == (1, 2)
        assert slots.snapshot()["a"] == (2, {"stack": np.array([2])})


class TestReplaceInPlace:
    """Every slot is owned, so the new weights go where the old ones are."""

    def test_waits_for_runs_and_holds_back_its_own_name_only(
        self, pool: ThreadPoolExecutor
    ) -> None:
        events: list[str] = []
        slots = make(2, {"a": 1, "b": 2}, Writes(lambda slot: events.append(f"write {slot}")))
        slots.pin("b")

        def run(name: str) -> None:
            with slots.lease([name, None]):
                events.append(f"run {name}")

        def run_slot(number: int) -> None:
            with slots.lease_slots([number, 0]):
                events.append(f"run slot {number}")

        with slots.lease(["a"]):
            filling = pool.submit(slots.fill, "a", NEW)
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

    def test_takes_an_idle_slot_while_runs_are_in_its_own(self) -> None:
        """They end with the old weights, and who comes later has the new ones."""
        memory = {1: 1.0, 2: 2.0}

        def write(slot: int, blocks: Blocks) -> None:
            memory[slot] = float(blocks["stack"][0])

        slots = make(2, {"a": 1, "b": 2}, write)
        with slots.lease(["a"]) as old:
            assert slots.fill("a", NEW, timeout=0) == 2
            assert (old["a"], memory) == (1, {1: 1.0, 2: -1.0})
            with slots.lease(["a"]) as new:
                assert new["a"] == 2
            assert slots.loaded == {"a": 2}
        assert slots.fill("a", NEW) == 1  # nobody is in that any more, and nobody's it is

    def test_nobody_gets_in_during_the_write(self, pool: ThreadPoolExecutor) -> None:
        entered: list[Future[None]] = []

        def run() -> None:
            with slots.lease(["a"]):
                pass

        def run_slot() -> None:
            with slots.lease_slots([1]):
                pass

        def look(slot: int) -> None:
            entered.extend([pool.submit(run), pool.submit(run_slot)])
            wait_until(lambda: num_waiting(slots) == 2)
            assert not any(one.done() for one in entered)

        slots = make(1, {"a": 1}, Writes(look))
        slots.fill("a", NEW)
        for one in entered:
            one.result(DEADLINE)

    def test_a_failing_write_leaves_no_half_written_slot(self) -> None:
        """The name means the old weights, which the next run pages in again."""
        memory = {1: 1.0, 2: 2.0}
        failures = [OSError("the device is gone")]

        def write(slot: int, blocks: Blocks) -> None:
            memory[slot] = float("nan")
            if failures:
                raise failures.pop()
            memory[slot] = float(blocks["stack"][0])

        slots = make(2, {"a": 1, "b": 2}, write)
        with pytest.raises(OSError, match="the device is gone"):
            slots.fill("a", NEW)
        assert slots.loaded == {"b": 2}
        with slots.lease(["a"]) as held:
            assert (held["a"], memory) == (1, {1: 1.0, 2: 2.0})
        assert slots.fill("a", NEW) == 1
        assert memory == {1: -1.0, 2: 2.0}

    def test_a_failing_write_to_a_free_slot_keeps_the_old_one(self) -> None:
        def fail(slot: int, blocks: Blocks) -> None:
            raise OSError("the device is gone")

        slots = make(2, {"a": 1}, fail)
        with pytest.raises(OSError, match="the device is gone"):
            slots.fill("a", NEW)
        with pytest.raises(OSError, match="the device is gone"):
            slots.fill("new", NEW)
        assert slots.loaded == {"a": 1}
        assert set(slots.listing()) == {"a"}
        with slots.lease(["a"]) as held:
            assert held["a"] == 1

    def test_an_interrupted_wait_lets_the_name_go_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        slots = make(1, {"a": 1})

        class Interrupted:
            def __init__(self) -> None:
                self.signal, self.start = self, None

            def acquire(self, blocking: bool = True, timeout: float = -1.0) -> None:
                if blocking:
                    raise KeyboardInterrupt

            def locked(self) -> bool:
                return False

        with slots.lease(["a"]), monkeypatch.context() as patched:
            patched.setattr(fair_queue, "_Ticket", Interrupted)
            with pytest.raises(KeyboardInterrupt):
                slots.fill("a", NEW)
            with slots.lease(["a"]) as held:
                assert held["a"] == 1, "it need not wait: nobody replaces it any more"
        assert slots.fill("a", NEW) == 1


class TestLease:
    def test_unload_while_in_use(self) -> None:
        slots = make(1, {"a": 1})
        with slots.lease(["a", "a", None]) as held:
            slots.remove("a")
            assert held == {None: 0, "a": 1}
            assert slots.loaded == {}
        text = (
            r"adapter 'a' is not loaded; 0 are, 0 of them in slots: see list_adapters\(\). Load"
            r" it with load_adapter\('a'\)"
        )
        with pytest.raises(lr.UnknownAdapterError, match=text), slots.lease(["a"]):
            pass

    def test_no_names_are_the_base(self) -> None:
        """Rows that only blend, and of nothing, name no adapter."""
        with make(1, {"a": 1}).lease([]) as held:
            assert held == {None: 0}

    def test_a_failing_run_gives_its_slots_back(self, pool: ThreadPoolExecutor) -> None:
        slots = make(1, {"a": 1})
        with pytest.raises(RuntimeError, match="the run failed"), slots.lease(["a"]):
            raise RuntimeError("the run failed")
        with pytest.raises(RuntimeError, match="the run failed"), slots.lease_slots([1, 1]):
            raise RuntimeError("the run failed")
        assert pool.submit(slots.fill, "a", NEW).result(DEADLINE) == 1

    def test_a_refused_lease_holds_nothing(self, pool: ThreadPoolExecutor) -> None:
        slots = make(2, {"a": 1, "b": 2})
        with pytest.raises(lr.UnknownAdapterError), slots.lease(["a", "nobody"]):
            pass
        with pytest.raises(lr.SegmentsError), slots.lease_slots([1, 3]):
            pass
        assert pool.submit(slots.fill, "a", NEW).result(DEADLINE) == 1

    def test_more_names_than_slots(self) -> None:
        slots = make(1, {"a": 1})
        text = "the batch names 2 adapters, but there are 1 slots; split the batch, or build with"
        with pytest.raises(lr.SlotsExceededError, match=text), slots.lease(["a", None, "b"]):
            pass

    @pytest.mark.parametrize("number", [-1, 3])
    def test_number_out_of_range(self, number: int) -> None:
        slots = make(2, {"a": 1})
        text = rf"slot {number} is out of range; this artifact has slots 0 \(the base\) to 2"
        with pytest.raises(lr.SegmentsError, match=text), slots.lease_slots([1, number]):
            pass

    def test_number_without_adapter(self) -> None:
        slots = make(2, {"a": 1})
        text = r"slot 2 holds no adapter: see list_adapters\(\); 1 of 2 do. Load one, or name"
        with pytest.raises(lr.SegmentsError, match=text), slots.lease_slots([0, 2]):
            pass

    def test_what_is_not_there(self) -> None:
        slots = make(2, {"a": 1})
        text = r"adapter 'b' is not loaded; 1 are, 1 of them in slots: see list_adapters\(\)"
        with pytest.raises(lr.UnknownAdapterError, match=text):
            slots.remove("b")
        with pytest.raises(lr.UnknownAdapterError, match=text):
            slots.unpin("b")
        with pytest.raises(lr.UnknownAdapterError, match=text):
            slots.pin("b")

    def test_no_error_names_the_adapters_of_others(self) -> None:
        """Not of those that are loaded, and not of those that are pinned."""
        slots = make(2, {"secret-1": 1, "secret-2": 2})
        errors = []
        for call in (
            lambda: slots.lease(["b"]).__enter__(),
            lambda: slots.lease_slots([3]).__enter__(),
            lambda: slots.remove("b"),
            lambda: slots.pin("b"),
        ):
            with pytest.raises(lr.BatchError) as caught:
                call()
            errors.append(str(caught.value))
        for name in ("secret-1", "secret-2"):
            slots.pin(name)
        with pytest.raises(lr.SlotsExceededError) as full:
            slots.fill("b", NEW)
        assert not [text for text in [*errors, str(full.value)] if "secret" in text]
        assert "2 slots are kept for pinned adapters" in str(full.value) or "all 2" in str(
            full.value
        )


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
