"""The runtime's engine over a graph whose own slots hold the adapters, and what its runs took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraexport_runtime.device.providers import normalise_providers
from loraexport_runtime.generation.engine import RequestEngine
from loraexport_runtime.generation.steps.files import StepFiles
from loraexport_runtime.generation.steps.prompts import PromptRead
from loraexport_runtime.generation.steps.runner import Runner
from loraexport_runtime.slots.pool import Blocks, Slots
from loraexport_runtime.slots.table import HostAdapter

from ..contestants.decoder_graphs import DecoderGraphs


@dataclass
class Runs:
    """What was run, in order: its size, and seconds until the device was done with it."""

    steps: list[tuple[int, float]] = field(default_factory=list)
    """Rows of each step."""
    reads: list[tuple[int, float]] = field(default_factory=list)
    """Tokens of each part of prompts, the padding between them counted too."""


class TimedRunner(Runner):
    """The runtime's runner, which notes what its runs take."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.runs = Runs()

    def step(self, *arguments: Any) -> None:
        begin = time.perf_counter()
        super().step(*arguments)
        self.runs.steps.append((arguments[0], time.perf_counter() - begin))

    def read(self, *arguments: Any) -> PromptRead:
        begin = time.perf_counter()
        read = super().read(*arguments)
        self.runs.reads.append((read.num_tokens, time.perf_counter() - begin))
        return read


def engine_over(folder: Path, runner: Runner, adapters: int, quota: int) -> RequestEngine:
    """An engine whose adapters are those of the graph's slots from 1 on, by their numbers.

    No text ends but by its length.
    """
    names = {
        str(slot): HostAdapter({}, {}, f"slot {slot}", 1.0, None) for slot in range(1, 1 + adapters)
    }
    loaded = {name: int(name) for name in names}
    slots = Slots(max(1, adapters), loaded, names, _read_nothing, _write_nothing)
    return RequestEngine(folder, runner, slots, frozenset(), quota=quota)


def make_runner(graphs: DecoderGraphs, rows: int, length: int) -> TimedRunner:
    """A runner of the mixed graph; its steps are CUDA graphs where there is CUDA."""
    folder, device = graphs.folder("mixed"), graphs.lab.device
    providers = normalise_providers([device.kind])
    captures = device.kind == "cuda"
    return TimedRunner(
        folder,
        providers,
        captures,
        {},
        rows,
        length,
        steps=StepFiles.of(folder),
        threads=device.threads,
    )


@contextmanager
def warm_engine(
    graphs: DecoderGraphs, rows: int, length: int, quota: int
) -> Iterator[tuple[RequestEngine, TimedRunner]]:
    """An engine with all of its steps prepared, and its runner."""
    runner = make_runner(graphs, rows, length)
    with engine_over(graphs.folder("mixed"), runner, graphs.adapters, quota) as engine:
        engine.warm_up()
        yield engine, runner


def _read_nothing(name: str) -> Blocks:
    raise AssertionError("every adapter is in the graph")


def _write_nothing(slot: int, blocks: Blocks) -> None:
    raise AssertionError("every adapter is in the graph")
