"""Rounds that alternate the contestants -> median and quartiles of each."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .device import Device
from .results import Timing
from .work import Work

_MAX_CALLS = 1000
_MIN_ROUNDS = 3
_ENOUGH = 4.0
"""Seconds after which a contestant steps out, once it has _MIN_ROUNDS."""


@dataclass
class _Clock:
    work: Work
    calls: int = 1
    at: int = 0
    """Calls so far: the inputs go on where the last round stopped."""
    spent: float = 0.0
    device: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def time_works(
    works: Mapping[str, Work], rounds: int, round_seconds: float, device: Device
) -> dict[str, Timing]:
    """Seconds per unit of each contestant.

    Each is warmed up over all copies of its inputs; then every round times each once, the order
    turned by one from round to round. A slow contestant takes part in fewer rounds.
    """
    clocks = {name: _Clock(work) for name, work in works.items()}
    for clock in clocks.values():
        _warm_up(clock, round_seconds, device)
    names = list(clocks)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            clock = clocks[name]
            if turn < _MIN_ROUNDS or clock.spent < _ENOUGH:
                _time_round(clock, device)
    return {name: _timing(clock) for name, clock in clocks.items()}


def _warm_up(clock: _Clock, round_seconds: float, device: Device) -> None:
    """Run every copy, then one more, from which follows how many calls make a round."""
    work = clock.work
    for call in work.calls:
        if work.prepare is not None:
            work.prepare()
        call()
    took, _ = _measure(clock, 1, device)
    clock.calls = min(_MAX_CALLS, max(1, math.ceil(round_seconds / max(took, 1e-9))))


def _time_round(clock: _Clock, device: Device) -> None:
    if clock.work.prepare is None:
        wall, on_device = _measure(clock, clock.calls, device)
    else:  # each call is measured alone, without what it needs before
        pairs = [_measure(clock, 1, device) for _ in range(clock.calls)]
        wall, on_device = (sum(values) for values in zip(*pairs, strict=True))
    units = clock.calls * clock.work.units
    clock.spent += wall
    clock.wall.append(wall / units)
    clock.device.append(on_device / units)


def _measure(clock: _Clock, calls: int, device: Device) -> tuple[float, float]:
    """(wall time, time between two events on the device) of some calls, in seconds."""
    work = clock.work
    if work.prepare is not None:
        work.prepare()
    device.synchronize()
    start, first = time.perf_counter(), device.event()
    for index in range(calls):
        work.calls[(clock.at + index) % len(work.calls)]()
    last = device.event()
    device.synchronize()
    wall = time.perf_counter() - start
    clock.at += calls
    return wall, wall if first is None else first.elapsed_time(last) / 1000


def _timing(clock: _Clock) -> Timing:
    lower, median, upper = np.percentile(clock.device, [25, 50, 75])
    return Timing(
        median=float(median),
        lower=float(lower),
        upper=float(upper),
        wall=float(np.median(clock.wall)),
        rounds=len(clock.device),
        calls=clock.calls,
    )
