"""Conditions that other threads bring about."""

import time
from collections.abc import Callable

import numpy as np

from loraexport_runtime.slots.gate import Gate
from loraexport_runtime.slots.pool import Slots
from loraexport_runtime.slots.table import HostAdapter

DEADLINE = 30.0
"""Seconds after which a thread that should have moved counts as stuck."""


def weights(value: float) -> HostAdapter:
    """An adapter of one number."""
    return HostAdapter({"site": 1}, {"stack": np.array([value])}, f"digest {value}", 1.0, None)


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    """Let other threads run until the condition holds; fail if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "no thread brought this about"
        time.sleep(0.001)


def num_waiting(slots: Slots) -> int:
    """Threads that sit in one of its waits."""
    line = list(slots._queue._waiting)
    return sum(ticket.start is not None and ticket.signal.locked() for ticket in line)


def num_inside(gate: Gate) -> int:
    """Other threads that are inside of it."""
    count = 0
    for entry in list(gate._entries.values()):
        if entry.acquire(blocking=False):  # type: ignore[attr-defined]
            entry.release()  # type: ignore[attr-defined]
        else:
            count += 1
    return count
