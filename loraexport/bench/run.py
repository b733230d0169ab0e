"""run(): a file of workloads -> results, part by part; and the files that show them."""

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from ..artifact import cannot_write, write_whole
from ..errors import ParityError, UsageError
from .contest import SCRATCH, Contest, run_contest
from .device import Device
from .report.markdown import to_markdown
from .report.plots import write_plots
from .report.words import axes
from .results import Cell, EngineCase, Results
from .workloads.projects import Lab
from .workloads.schema import (
    GenerationWorkload,
    LayersWorkload,
    ModelWorkload,
    Workload,
    Workloads,
)

Progress = Callable[[str], None]
Measure = Callable[[], Cell | EngineCase]


def run(bench: Workloads, out: Path, progress: Progress = lambda stage: None) -> Results:
    """Measure every cell of every workload.

    `out`/bench.json is written after each cell: a run that is cut short leaves what it found.

    Cells whose contestants disagree are not timed, and end in `disagreements`.

    Raises:
        ProviderError: the device cannot run here.
        BaseModelError, UsageError: a workload cannot be made, or `out` cannot.
    """
    _make_folder(out)
    device = Device(bench.device, bench.threads)
    results = Results(environment=device.environment(), workloads=bench, cells=())
    for workload in bench.workloads:
        progress(f"{workload.name}: make the base, the adapters and the graphs")
        with tempfile.TemporaryDirectory(prefix=SCRATCH) as folder, device.active():
            for words, measure in _parts(workload, Lab(Path(folder), device, bench)):
                progress(f"{workload.name}: {words}")
                results = _with(results, measure)
                _write_json(results, out)
        device.free()
    return results


def _with(results: Results, measure: Measure) -> Results:
    """The results and one cell or case more, or one disagreement."""
    try:
        found = measure()
    except ParityError as error:
        return results.model_copy(update={"disagreements": (*results.disagreements, str(error))})
    if isinstance(found, Cell):
        return results.model_copy(update={"cells": (*results.cells, found)})
    return results.model_copy(update={"engines": (*results.engines, found)})


def write_report(results: Results, out: Path) -> UsageError | None:
    """Write bench.json, bench.md and the plots; give why there are no plots, if so.

    Raises UsageError, DiskFullError: nothing can be written there.
    """
    _make_folder(out)
    _write_json(results, out)
    write_whole(out / "bench.md", to_markdown(results).encode())
    try:
        write_plots(results, out)
    except UsageError as error:
        return error
    return None


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error


def _write_json(results: Results, out: Path) -> None:
    text = results.model_dump_json(indent=1)
    write_whole(out / "bench.json", f"{text}\n".encode())


def _parts(workload: Workload, lab: Lab) -> Iterator[tuple[str, Measure]]:
    """What is measured, in words, and how; each is made when its turn has come."""
    if workload.kind == "engine":
        from .engine.cases import engine_cases

        yield from engine_cases(workload, lab)
        return
    for contest in _contests(workload, lab):
        words = ", ".join(axes(contest.cell).values())
        yield words, partial(run_contest, contest, lab.bench, lab.device)


def _contests(
    workload: LayersWorkload | ModelWorkload | GenerationWorkload, lab: Lab
) -> Iterator[Contest]:
    if workload.kind == "layers":
        from .contestants.layers import layer_contests

        yield from layer_contests(workload, lab)
    elif workload.kind == "model":
        from .contestants.model import model_contests

        yield from model_contests(workload, lab)
    else:
        from .contestants.generation import generation_contests

        yield from generation_contests(workload, lab)
