"""The runtime's engine as one of the ways to decode, whose steps are made when they are timed."""

import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from loraexport_runtime.device.kernels import STOCK, KernelChoice
from loraexport_runtime.generation.handle import GeneratedToken, GenerationHandle
from loraexport_runtime.generation.request import GenerationRequest
from loraexport_runtime.generation.steps.files import StepFiles
from loraexport_runtime.generation.steps.runner import Runner
from loraexport_runtime.generation.steps.step import NOTHING

from ..device import Device
from ..engine.timed import engine_over
from .decoders import PromptBatch

_ALL = 1 << 14
"""Permits for whatever steps are left."""


class PacedRunner(Runner):
    """The runtime's runner, which makes no step before it may."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.is_remote = True  # so that all rows begin to decode at the same time
        self.permits = threading.Semaphore(0)

    def using(self) -> AbstractContextManager[None]:
        """Nothing: where it waits for a permit it uses no device, and others may capture."""
        return nullcontext()

    def step(self, rows: int, meanwhile: AbstractContextManager[None] = NOTHING) -> None:
        super().step(rows, self._paced(meanwhile))

    @contextmanager
    def _paced(self, meanwhile: AbstractContextManager[None]) -> Iterator[None]:
        with meanwhile:
            self.permits.acquire()
            yield


class RuntimeDecoder:
    """The runtime's engine as services use it, its steps CUDA graphs where there is CUDA."""

    most_steps = None
    prepare = None

    def __init__(
        self,
        folder: Path,
        prompts: PromptBatch,
        device: Device,
        adapters: int,
        providers: Any,
        library: Path | None = None,
    ) -> None:
        """
        Args:
            adapters: those in the graph's own slots, from 1 on.
            library: of kernels, for a graph that calls functions.
        """
        self._prompts = prompts
        length = prompts.length + prompts.new_tokens + 2
        capture = device.kind == "cuda"
        self._runner = PacedRunner(
            folder,
            providers,
            capture,
            {},
            prompts.rows,
            length,
            steps=StepFiles.of(folder),
            threads=device.threads,
            kernels=STOCK if library is None else KernelChoice(library, "kernels"),
        )
        quota = max(2, prompts.rows * prompts.length)
        self._engine = engine_over(folder, self._runner, adapters, quota)
        # Called ahead of the engine's own end, which waits for a thread that may stand at a step.
        weakref.finalize(self._engine, self._runner.permits.release, _ALL)
        self._has_adapters = adapters > 0
        self._streams: list[Iterator[GeneratedToken]] = []
        self._handles: list[GenerationHandle] = []
        self._chosen: list[list[int]] = []

    def prefill(self) -> None:
        raise NotImplementedError("it chooses a token too")

    def start_decode(self) -> None:
        self._stop()
        prompts = self._prompts
        requests = [
            GenerationRequest(
                tokens=ids,
                adapter=str(slot) if slot and self._has_adapters else None,
                max_tokens=prompts.new_tokens + 1,
            )
            for ids, slot in zip(prompts.ids.tolist(), prompts.slots.tolist(), strict=True)
        ]
        self._handles = self._engine.submit_all(requests)
        self._streams = [iter(handle) for handle in self._handles]
        self._chosen = [[next(stream).token] for stream in self._streams]

    def decode(self, steps: int) -> None:
        self._runner.permits.release(steps)
        for stream, chosen in zip(self._streams, self._chosen, strict=True):
            chosen += [next(stream).token for _ in range(steps)]

    def logits(self) -> np.ndarray:
        raise NotImplementedError("they stay on the device")

    def tokens(self, num: int) -> np.ndarray:
        return np.array([chosen[:num] for chosen in self._chosen])

    def _stop(self) -> None:
        """End what was asked for before; the thread may stand before a step."""
        for handle in self._handles:
            handle.cancel()
        while not all(handle.is_done for handle in self._handles):
            self._runner.permits.release()
            time.sleep(0.001)
        while self._runner.permits.acquire(blocking=False):
            pass
