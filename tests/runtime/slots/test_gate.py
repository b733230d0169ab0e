"""The gate that a call passes: it closes once those inside have left."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from support.waiting import DEADLINE, wait_until

import loraexport_runtime as lr
from loraexport_runtime.slots.gate import Gate


def test_closed_means_nobody_gets_in() -> None:
    gate = Gate("the session of x", "open the artifact again")
    given_up: list[int] = []
    with gate.entry(), gate:
        assert not gate.is_closed
    gate.close(lambda: given_up.append(1))
    gate.close(lambda: given_up.append(2))
    assert given_up == [1], "the second time there is nothing to do"
    for enter in (gate.entry, gate.__enter__, gate.check):
        with pytest.raises(lr.ClosedError, match=r"^the session of x is closed; open the artifact"):
            enter()
    assert gate.is_closed


def test_close_waits_for_those_inside() -> None:
    gate = Gate("it", "open it again")
    leave, inside = threading.Event(), threading.Barrier(4)
    events: list[str] = []

    def call() -> None:
        with gate.entry(), gate:
            inside.wait(DEADLINE)
            assert leave.wait(DEADLINE)
            events.append("call")

    def close() -> None:
        gate.close(lambda: events.append("give up"))
        events.append("close")

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(call) for _ in range(3)]
        inside.wait(DEADLINE)
        closing = [pool.submit(close) for _ in range(2)]
        wait_until(lambda: gate.is_closed)
        with pytest.raises(lr.ClosedError):
            gate.check()
        assert events == []
        leave.set()
        for one in (*closing, *calls):
            one.result(DEADLINE)
    assert events == ["call"] * 3 + ["give up"] + ["close"] * 2


def test_close_while_others_try_to_get_in() -> None:
    """Those who never stop asking do not keep it waiting; nobody is inside who came later."""
    gate = Gate("it", "open it again")
    is_given_up, ended = threading.Event(), threading.Event()

    def ask() -> None:
        while not ended.is_set():
            with suppress(lr.ClosedError), gate.entry(), gate:
                assert not is_given_up.is_set()

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        wait_until(lambda: len(gate._entries) == 8)
        closing = threading.Thread(target=gate.close, args=(is_given_up.set,), daemon=True)
        closing.start()
        closing.join(DEADLINE)
        ended.set()
        assert is_given_up.is_set()
        for one in asking:
            one.result(DEADLINE)


def test_a_call_inside_of_a_call() -> None:
    """As a signal's handler or a finalizer makes it; the outer one is inside to its end."""
    gate = Gate("it", "open it again")
    events: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        with gate.entry(), gate:
            with gate.entry(), gate:
                pass
            closing = pool.submit(gate.close, lambda: events.append("closed"))
            wait_until(lambda: gate.is_closed)
            events.append("call")
        closing.result(DEADLINE)
    assert events == ["call", "closed"]


def test_a_close_that_fails_is_done_again() -> None:
    gate = Gate("it", "open it again")
    begun: list[int] = []

    def give_up() -> None:
        begun.append(1)
        if len(begun) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gate.close(give_up)
    for _ in range(2):
        gate.close(give_up)
    assert len(begun) == 2


def test_threads_that_have_ended_leave_nothing() -> None:
    gate = Gate("it", "open it again")

    def call() -> None:
        with gate.entry(), gate:
            pass

    for _ in range(50):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(DEADLINE)
    assert len(gate._entries) < 25, "their numbers come again"


def test_a_call_that_fails_has_left() -> None:
    gate = Gate("it", "open it again")
    with pytest.raises(RuntimeError, match="it failed"), gate.entry(), gate:
        raise RuntimeError("it failed")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(gate.close, lambda: None).result(DEADLINE)


def test_the_child_of_a_fork_is_refused() -> None:
    """Also where a thread of the parent is inside, or closes it, which nobody ends in the child."""
    gate = Gate("the session of x", "open the artifact again")
    reader, writer = os.pipe()
    inside, leave = threading.Event(), threading.Event()

    def call() -> None:
        with gate.entry(), gate, gate._closing:
            inside.set()
            assert leave.wait(DEADLINE)

    thread = threading.Thread(target=call)
    thread.start()
    assert inside.wait(DEADLINE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while threads run
        child = os.fork()
        if child == 0:
            text = "no error"
            try:
                gate.close(lambda: None)
                gate.entry()
            except lr.ClosedError as error:
                text = str(error)
            finally:
                own = Gate("it", "open it")
                with own.entry(), own:  # works
                    os.write(writer, text.encode())
                os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.read() == (
            "the session of x is of the process that this one was forked from, whose threads are"
            " not here; open the artifact again in this process, or start processes by spawn"
        )
    os.waitpid(child, 0)
    leave.set()
    thread.join(DEADLINE)
    with gate.entry(), gate:
        assert not gate.is_closed, "the parent goes on"
