"""An exception may come between any two lines of a lease, a load or a wait: no slot stays taken.

The same of the gate around them: nobody stays counted, and what was closed is given up.
"""

import ctypes
import dis
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType, FrameType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import pytest
from support.waiting import DEADLINE, num_inside, num_waiting, wait_until, weights

from loraexport_runtime.slots import fair_queue, gate, pool, table
from loraexport_runtime.slots.gate import Gate
from loraexport_runtime.slots.pool import Blocks, Slots

T = TypeVar("T")
FILES = {module.__file__ for module in (fair_queue, gate, pool, table)}
SLOTS = {"a": 1, "b": 2}
CONTENT: WeakKeyDictionary[Slots, dict[int, Blocks | None]] = WeakKeyDictionary()
"""What has been written into each slot of those that `make` made."""


def make() -> Slots:
    """Two slots, three adapters, and `unread`, which the artifact carries."""

    def read(name: str) -> Blocks:
        return {"stack": np.zeros(1)}

    adapters = {name: weights(at) for at, name in enumerate("abc")}
    content = {slot: adapters[name].blocks for name, slot in SLOTS.items()}
    adapters["unread"] = table.HostAdapter({}, None, "digest", 1.0, None)
    slots = Slots(2, SLOTS, adapters, read, content.__setitem__)
    CONTENT[slots] = content
    return slots


def lease(*names: str | None) -> Callable[[Slots], None]:
    def call(slots: Slots) -> None:
        with slots.lease(names, DEADLINE):
            pass

    return call


def lease_slots(slots: Slots) -> None:
    with slots.lease_slots([0, 1, 2]):
        pass


def fill_a_free_slot(slots: Slots) -> None:
    """The name flips from one slot to another."""
    slots._table.slots.pop("b")  # as if it had been paged out
    slots.fill("a", weights(8))


def wait_in_line(slots: Slots) -> None:
    """The first attempts fail: another run holds both slots, and leaves."""
    holder = slots.lease(["a", "b"])
    holder.__enter__()
    ended = threading.Event()

    def leave() -> None:
        while not num_waiting(slots) and not ended.is_set():
            time.sleep(0.0002)
        holder.__exit__(None, None, None)

    thread = threading.Thread(target=leave)
    thread.start()
    try:
        lease("c")(slots)
    finally:
        trace, _ = sys.gettrace(), sys.settrace(None)
        ended.set()
        thread.join(DEADLINE)
        sys.settrace(trace)


CALLS: dict[str, Callable[[Slots], None]] = {
    "a hit": lease("a", None),
    "a page": lease("a", "c"),
    "a read": lease("unread"),
    "numbers": lease_slots,
    "a load": lambda slots: void(slots.fill("new", weights(7))),
    "a replacement": lambda slots: void(slots.fill("a", weights(8))),
    "a replacement elsewhere": fill_a_free_slot,
    "a wait": wait_in_line,
    "a pin": lambda slots: void(slots.pin("c"), slots.unpin("c")),
}


def void(*_: object) -> None:
    """What the calls give is not looked at."""


def interrupted(call: Callable[[T], None], subject: T, line: int) -> bool:
    """Whether the call came to its so-manieth line of ours, where it was interrupted."""
    seen = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line" and not is_leaving(frame):
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()  # a measurement of coverage goes on afterwards
    sys.settrace(trace)
    try:
        call(subject)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def is_leaving(frame: FrameType) -> bool:
    """Whether the line is a `with` that is about to call `__exit__`.

    A tracer can raise there, ahead of the call, but no signal and no other thread: Python looks for
    theirs after calls and at jumps.
    """
    ahead = [op for op in instructions(frame.f_code) if op.offset >= frame.f_lasti][:5]
    return sum(op.opname == "LOAD_CONST" and op.argval is None for op in ahead) >= 3


@cache
def instructions(code: CodeType) -> list[dis.Instruction]:
    """Of a function of ours, once."""
    return list(dis.get_instructions(code))


def check_whole(slots: Slots) -> None:
    """Nobody holds anything, every adapter can be run still, and is what its slot holds."""
    check_content(slots)
    assert not slots._table._claims
    assert not slots._queue._waiting
    assert threads_can_take(slots._lock)
    assert threads_can_take(slots._reading)
    slots.unpin("c")
    for names in (["a", "b"], ["c", "unread"], ["a", "c"]):
        with slots.lease(names, DEADLINE) as held:
            assert sorted(held.values()) == [0, 1, 2]
    slots.fill("last", weights(9), DEADLINE)
    assert slots.listing()["last"].slot in (1, 2)
    check_content(slots)


def check_content(slots: Slots) -> None:
    for slot, blocks in slots.snapshot().values():
        assert CONTENT[slots][slot] is blocks


def threads_can_take(lock: Any) -> bool:
    taken: list[bool] = []

    def take() -> None:
        taken.append(lock.acquire(timeout=1))
        if taken[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join(DEADLINE)
    return taken == [True]


@pytest.mark.parametrize("name", CALLS)
def test_at_every_line(name: str) -> None:
    line = 1
    while True:
        slots = make()
        if not interrupted(CALLS[name], slots, line):
            break
        check_whole(slots)
        line += 1
    assert line > 10
    check_whole(slots)


def close(gate: Gate) -> None:
    gate.close(lambda: None)


def enter(gate: Gate) -> None:
    with gate.entry(), gate:
        pass


@pytest.mark.parametrize("call", [enter, close])
def test_at_every_line_of_the_gate(call: Callable[[Gate], None]) -> None:
    line, given_up = 0, 0

    def give_up() -> None:
        nonlocal given_up
        given_up += 1

    is_interrupted = True
    while is_interrupted:
        line += 1
        gate = Gate("it", "open it again")
        enter(gate)
        is_interrupted = interrupted(call, gate, line)
        thread = threading.Thread(target=gate.close, args=(give_up,), daemon=True)
        thread.start()
        thread.join(DEADLINE)
        assert not thread.is_alive(), f"who was interrupted at line {line} counts as inside"
    assert line > 5
    assert given_up >= line - 2, "an interrupted close is ended by the next one"


@pytest.fixture
def untraced() -> Iterator[None]:
    """Threads that no coverage follows: one cancelled in its lines would leave its lock taken."""
    trace = threading.gettrace()
    threading.settrace(None)  # type: ignore[arg-type]  # as coverage does
    yield
    threading.settrace(trace)  # type: ignore[arg-type]


@pytest.mark.usefixtures("untraced")
def test_a_thread_that_is_cancelled_at_the_gate() -> None:
    class Cancelled(BaseException):
        pass

    gate = Gate("it", "open it again")

    def work() -> None:
        try:
            while True:
                for _ in range(1000):
                    enter(gate)
        except Cancelled:
            pass

    rng = np.random.default_rng(0)
    for _ in range(100):
        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(float(rng.uniform(0, 0.002)))
        wait_until(lambda thread=thread: cancel(thread, Cancelled))  # type: ignore[misc]
        assert num_inside(gate) == 0
    given_up: list[int] = []
    gate.close(lambda: given_up.append(1))
    assert given_up == [1]


@pytest.mark.usefixtures("untraced")
def test_a_thread_that_is_cancelled() -> None:
    """Wherever it is, in the standard library's lines too."""

    class Cancelled(BaseException):
        pass

    slots, rounds = make(), 60

    def work() -> None:
        try:
            while True:
                for name in ("a", "c", "b"):
                    lease(name)(slots)
                slots.fill("b", weights(3), DEADLINE)
        except Cancelled:
            pass

    rng = np.random.default_rng(0)
    for _ in range(rounds):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(float(rng.uniform(0, 0.004)))
        for thread in threads:
            wait_until(lambda thread=thread: cancel(thread, Cancelled))  # type: ignore[misc]
        for thread in threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        del threads, thread
        assert not slots._table._claims
        assert not slots._queue._waiting
    check_whole(slots)


def cancel(thread: threading.Thread, kind: type[BaseException]) -> bool:
    """Raise it in the thread; True once it has ended (one may be lost where it cannot be told)."""
    assert thread.ident is not None
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(kind)
        )
        thread.join(3)  # a second exception would interrupt the giving back that the first began
    return not thread.is_alive()
