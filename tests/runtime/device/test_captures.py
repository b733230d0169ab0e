"""Uses of a device beside each other, and captures alone."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import pytest

from loraexport_runtime.device import captures as module
from loraexport_runtime.device.captures import Captures, capturing, using

DEADLINE = 30.0


def _holding(
    hold: Callable[[], AbstractContextManager[None]], threads: ThreadPoolExecutor
) -> tuple[threading.Event, threading.Event, "Future[None]"]:
    """A thread that holds something until it is told: (it does, it is to leave, it has left)."""
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with hold():
            entered.set()
            assert leave.wait(DEADLINE)

    return entered, leave, threads.submit(work)


@pytest.fixture
def captures() -> Captures:
    return Captures()


def _waits(entered: threading.Event) -> bool:
    return not entered.wait(0.05)


def test_uses_stand_beside_each_other(captures: Captures) -> None:
    with ThreadPoolExecutor(2) as threads:
        held = [_holding(captures.use, threads) for _ in range(2)]
        for entered, _, _ in held:
            assert entered.wait(DEADLINE)
        for _, leave, done in held:
            leave.set()
            done.result(DEADLINE)


def test_a_capture_stands_alone(captures: Captures) -> None:
    """It waits for those who use the device, and whoever comes then waits for it."""
    with ThreadPoolExecutor(3) as threads:
        first, first_leave, first_done = _holding(captures.use, threads)
        assert first.wait(DEADLINE)
        entered, leave, done = _holding(captures.capture, threads)
        assert _waits(entered)
        late, late_leave, late_done = _holding(captures.use, threads)
        assert _waits(late)
        first_leave.set()
        first_done.result(DEADLINE)
        assert entered.wait(DEADLINE)
        assert _waits(late)
        leave.set()
        done.result(DEADLINE)
        assert late.wait(DEADLINE)
        late_leave.set()
        late_done.result(DEADLINE)


def test_who_uses_it_may_use_it_again_and_capture(captures: Captures) -> None:
    with captures.use(), captures.use(), captures.capture(), captures.use():
        pass
    with captures.capture():
        pass
    assert not captures._uses


def test_two_that_use_it_may_both_capture(captures: Captures) -> None:
    """Each gives its use up meanwhile, and has it again afterwards."""
    both, inside, most = threading.Barrier(2), 0, 0

    def work() -> None:
        nonlocal inside, most
        with captures.use():
            both.wait(DEADLINE)
            with captures.capture():
                inside += 1
                most = max(most, inside)
                time.sleep(0.01)
                inside -= 1

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(work) for _ in range(2)]:
            done.result(DEADLINE)
    assert most == 1
    assert not captures._uses


def test_an_error_leaves_nothing_held(captures: Captures) -> None:
    for hold in (captures.use, captures.capture):
        with pytest.raises(KeyError, match="what it was"), hold():
            raise KeyError("what it was")
    with ThreadPoolExecutor(1) as threads:
        entered, leave, done = _holding(captures.capture, threads)
        assert entered.wait(DEADLINE)
        leave.set()
        done.result(DEADLINE)


def test_a_cpu_has_no_captures(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CAPTURES", captures)
    with using(("cpu", 0)), capturing(("cpu", 0)):
        assert not captures._uses
    with using(("cuda", 0)):
        assert captures._uses == {threading.get_ident(): 1}
    with capturing(("cuda", 1)):
        assert captures._capturer == threading.get_ident()
