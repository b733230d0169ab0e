"""What a contestant does in a cell, and how its calls take turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


class CannotRun(Exception):  # noqa: N818  a finding for the tables, not an error of the run
    """Why a contestant takes no part in a cell."""


@dataclass(frozen=True)
class Work:
    """A contestant that is ready to run."""

    calls: Sequence[Callable[[], object]]
    """One for each copy of the inputs."""
    output: Callable[[], np.ndarray]
    """What the last run of the first of them gave; int64 [rows, n] for tokens."""
    units: int = 1
    """Units of the cell in a call: layers, batches, steps."""
    prepare: Callable[[], object] | None = None
    """Before each call, and not timed."""


def run_in_turn(calls: Sequence[Callable[[], object]]) -> None:
    """A call that is made of several."""
    for call in calls:
        call()
