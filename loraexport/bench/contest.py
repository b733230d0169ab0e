"""What a contestant is; whether all of a cell agree; and a cell from its contestants."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

import numpy as np

from ..errors import ParityError
from .device import Device
from .results import Cell, Entry
from .work import CannotRun, Work
from .workloads.schema import Workloads

Group = Literal["base", "mixed"]
KERNELS = " kernels"
"""How the names of contestants go on that run on loraexport-kernels."""
MIXED_KERNELS = f"mixed{KERNELS}"
SCRATCH = "loraexport-bench-"
"""How the names of scratch folders begin."""

# Sums in another order and roundings in between, through all layers; not a proof, which is
# verify's, but far below what one row with a wrong adapter would show.
_TOLERANCES = {"float32": 1e-3, "float16": 6e-2, "bfloat16": 2e-1}
_TOKENS_TOLERANCE = 0.5
"""Share of rows: of random weights the two likeliest tokens may be a rounding apart."""


@dataclass(frozen=True)
class Contestant:
    name: str
    group: Group
    make: Callable[[], Work]


@dataclass(frozen=True)
class Contest:
    """A cell to be."""

    cell: Cell
    """Without entries."""
    contestants: Sequence[Contestant]
    """The first of each group that runs is what the others are compared with."""
    ours: Sequence[str]
    """What stands for this project: the first of these that runs."""
    leave_out: Sequence[str] = ()
    """Contestants that the workload does not want."""


class Batch(Protocol):
    """A batch of layers or of a whole model, and how it is run by what else could."""

    def onnx(self, kind: str, captured: bool) -> Work: ...

    def base_torch(self) -> Work: ...

    def base_compiled(self) -> Work: ...

    def loop(self) -> Work: ...

    def masked(self) -> Work: ...

    def masked_compiled(self) -> Work: ...

    def peft(self) -> Work: ...

    def one_at_a_time(self) -> Work: ...


def peers(batch: Batch) -> list[Contestant]:
    """The base alone, and who else runs a mixed batch."""
    return [
        Contestant("base", "base", partial(batch.onnx, "base", False)),
        Contestant("base captured", "base", partial(batch.onnx, "base", True)),
        Contestant("base torch", "base", batch.base_torch),
        Contestant("base torch.compile", "base", batch.base_compiled),
        Contestant("segmented torch", "mixed", batch.loop),
        Contestant("masked torch", "mixed", batch.masked),
        Contestant("masked torch.compile", "mixed", batch.masked_compiled),
        Contestant("PEFT", "mixed", batch.peft),
        Contestant("one at a time", "mixed", batch.one_at_a_time),
    ]


def base_of(name: str) -> str:
    """The base alone that a contestant's overhead is over: captured over captured."""
    return next((f"base {how}" for how in ("captured", "GenAI") if name.endswith(how)), "base")


def run_contest(contest: Contest, bench: Workloads, device: Device) -> Cell:
    """Make the contestants, compare their outputs, time them.

    Raises:
        ParityError: two of them disagree, so that times would say nothing.
    """
    try:
        return _run_contest(contest, bench, device)
    finally:
        device.forget_compiled()


def _run_contest(contest: Contest, bench: Workloads, device: Device) -> Cell:
    from .timing import time_works  # which needs Work

    works: dict[str, Work] = {}
    outputs: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    contestants = [
        contestant for contestant in contest.contestants if contestant.name not in contest.leave_out
    ]
    groups = {contestant.name: contestant.group for contestant in contestants}
    for contestant in contestants:
        try:
            work = contestant.make()
            if work.prepare is not None:
                work.prepare()
            work.calls[0]()
            device.synchronize()
            works[contestant.name], outputs[contestant.name] = work, work.output()
        except Exception as error:  # another library's refusal is what the table shows
            left_out[contestant.name] = reason_of(error)
            device.recover()
    differences = check_agreement(_title(contest.cell), outputs, groups, bench.dtype)
    timings = time_works(works, bench.rounds, bench.round_ms / 1000, device) if works else {}
    entries = tuple(
        Entry(name=name, group=groups[name], timing=timing, difference=differences[name])
        for name, timing in timings.items()
    )
    ours = next((name for name in contest.ours if name in works), None)
    return contest.cell.model_copy(update={"entries": entries, "left_out": left_out, "ours": ours})


def check_agreement(
    where: str, outputs: Mapping[str, np.ndarray], groups: Mapping[str, Group], dtype: str
) -> dict[str, float]:
    """How far each output is from the first of its group.

    Raises:
        ParityError: further than rounding explains, or no adapter changes anything.
    """
    first: dict[Group, str] = {}
    differences = {}
    for name, y in outputs.items():
        reference = outputs[first.setdefault(groups[name], name)]
        differences[name] = largest_difference(y, reference)
        allowed = _TOKENS_TOLERANCE if y.dtype == np.int64 else _TOLERANCES[dtype]
        if not differences[name] <= allowed:  # NaN is not
            raise ParityError(
                f"{where}: {name!r} disagrees with {first[groups[name]]!r}: difference"
                f" {differences[name]:.1e}, allowed {allowed:.0e}; a time of wrong numbers says"
                " nothing"
            )
    if len(first) == 2:
        base, mixed = (outputs[first[group]] for group in ("base", "mixed"))
        moved = largest_difference(mixed, base)
        if mixed.dtype != np.int64 and not moved > _TOLERANCES[dtype]:
            raise ParityError(
                f"{where}: the adapters move the base's output by {moved:.1e} only, so that a"
                " contestant without them would pass; take a larger rank"
            )
    return differences


def largest_difference(y: np.ndarray, reference: np.ndarray) -> float:
    """max |y - y0| / max |y0|; of tokens the share of rows that differ anywhere."""
    if y.shape != reference.shape:
        return float("inf")
    if y.dtype == np.int64:
        return float((y != reference).any(axis=1).mean())
    exact, expected = y.astype(np.float64), reference.astype(np.float64)
    return float(np.abs(exact - expected).max() / np.abs(expected).max())


def reason_of(error: Exception) -> str:
    """One line, without the scratch folder's name."""
    text = (str(error).strip().splitlines() or ["no message"])[0]
    text = re.sub(rf"\S*{SCRATCH}[^/]*/", "", text)[:200]
    return text if isinstance(error, CannotRun) else f"{type(error).__name__}: {text}"


def _title(cell: Cell) -> str:
    phase = f", {cell.phase}" if cell.phase else ""
    return (
        f"workload {cell.workload!r}, {cell.adapters} adapters of {cell.rank_label}, {cell.rows}"
        f" rows, {cell.tokens} tokens{phase}"
    )
