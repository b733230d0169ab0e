"""The gate that a call passes: it closes once those inside have left."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.waiting import DEADLINE, wait_until

import loraexport_runtime as lr
from loraexport_runtime.slots.gate import Gate


def test_closed_means_nobody_gets_in() -> None:
    gate = Gate("the session of x", "open the artifact again")
    with gate:
        assert not gate.is_closed
    assert gate.close()
    assert not gate.close(), "the second time there is nothing to do"
    for enter in (gate.__enter__, gate.check):
        with pytest.raises(lr.ClosedError, match=r"^the session of x is closed; open the artifact"):
            enter()
    assert gate.is_closed


def test_close_waits_for_those_inside() -> None:
    gate = Gate("it", "open it again")
    leave, inside = threading.Event(), threading.Barrier(4)
    events: list[str] = []

    def call() -> None:
        with gate:
            inside.wait(DEADLINE)
            assert leave.wait(DEADLINE)
            events.append("call")

    def close() -> bool:
        is_first = gate.close()
        events.append("close")
        return is_first

    with ThreadPoolExecutor(5) as pool:
        calls = [pool.submit(call) for _ in range(3)]
        inside.wait(DEADLINE)
        closing = [pool.submit(close) for _ in range(2)]
        wait_until(lambda: gate.is_closed)
        with pytest.raises(lr.ClosedError):
            gate.check()
        assert events == []
        leave.set()
        assert sorted(one.result(DEADLINE) for one in closing) == [False, True]
        for one in calls:
            one.result(DEADLINE)
    assert events == ["call"] * 3 + ["close"] * 2


def test_a_call_that_fails_has_left() -> None:
    gate = Gate("it", "open it again")
    with pytest.raises(RuntimeError, match="it failed"), gate:
        raise RuntimeError("it failed")
    assert gate.close()
