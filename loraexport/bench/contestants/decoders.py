"""Ways to decode greedily: onnxruntime-genai, the runtime's own engine, eager torch; plain_decoder
has plain onnxruntime.

Each reads the prompts (`prefill`), and then makes one token per row and step (`decode`). The
prompts are the same each time: the weights that a step reads push them out of any cache.
"""

import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from loraexport_runtime.generation.engine import RequestEngine
from loraexport_runtime.generation.handle import GeneratedToken, GenerationHandle
from loraexport_runtime.generation.request import GenerationRequest
from loraexport_runtime.generation.steps.files import StepFiles
from loraexport_runtime.generation.steps.runner import Runner
from loraexport_runtime.slots.pool import Blocks, Slots
from loraexport_runtime.slots.table import HostAdapter

from ..device import Device
from ..work import CannotRun


@dataclass(frozen=True)
class PromptBatch:
    """int64 [rows, length] on the host, a slot for each row, and how many tokens shall follow."""

    ids: np.ndarray
    slots: np.ndarray
    new_tokens: int

    @property
    def rows(self) -> int:
        return int(self.ids.shape[0])

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])

    def of(self, rows: Sequence[int]) -> "PromptBatch":
        return PromptBatch(self.ids[rows], self.slots[rows], self.new_tokens)


class DecodeRunner(Protocol):
    """What the contestants have in common."""

    @property
    def most_steps(self) -> int | None:
        """That one call of `decode` takes; None: as many as there are."""

    @property
    def prepare(self) -> Callable[[], object] | None:
        """What a prefill needs first, and is not timed."""

    def prefill(self) -> None: ...

    def start_decode(self) -> None:
        """Read the prompts and choose the first token."""

    def decode(self, steps: int) -> None: ...

    def logits(self) -> np.ndarray:
        """Of the prompts' last tokens after a prefill, float [rows, vocabulary]."""

    def tokens(self, num: int) -> np.ndarray:
        """The first new ones after `decode`, int64 [rows, num]."""


class GenaiModel:
    """A graph opened by onnxruntime-genai, as its users do."""

    def __init__(self, folder: Path, device: Device) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise CannotRun("onnxruntime-genai is not installed (loraexport[genai])") from error
        self.og: Any = onnxruntime_genai
        config = self.og.Config(str(folder))
        config.clear_providers()
        if device.kind == "cuda":
            config.append_provider("cuda")
            config.set_provider_option("cuda", "use_tf32", "0")
        self.model = self.og.Model(config)


class GenaiDecoder:
    """onnxruntime-genai; the likeliest token is chosen by its own search."""

    most_steps = None

    def __init__(self, model: GenaiModel, prompts: PromptBatch, mixed: bool) -> None:
        self._model, self._prompts, self._mixed = model, prompts, mixed
        self._generator: Any = None

    def prepare(self) -> None:
        og, prompts = self._model.og, self._prompts
        params, length = og.GeneratorParams(self._model.model), prompts.length + prompts.new_tokens
        # No row ends early, whatever its tokens.
        params.set_search_options(batch_size=prompts.rows, max_length=length, min_length=length)
        self._generator = og.Generator(self._model.model, params)
        if self._mixed:
            self._generator.set_model_input("adapter_ids", prompts.slots)

    def prefill(self) -> None:
        self._generator.append_tokens(self._prompts.ids.astype(np.int32))
        self.decode(1)

    def start_decode(self) -> None:
        self.prepare()
        self.prefill()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._generator.generate_next_token()
        self._generator.get_next_tokens()  # waits for the device

    def logits(self) -> np.ndarray:
        self.prepare()  # the search changes them when it chooses
        self._generator.append_tokens(self._prompts.ids.astype(np.int32))
        return np.array(self._generator.get_output("logits"))[:, -1]

    def tokens(self, num: int) -> np.ndarray:
        start, rows = self._prompts.length, range(self._prompts.rows)
        every = [np.array(self._generator.get_sequence(row))[start : start + num] for row in rows]
        return np.stack(every).astype(np.int64)


class GroupedDecoder:
    """A decoder for each group of rows, one after another."""

    most_steps = None

    def __init__(self, decoders: Sequence[GenaiDecoder], groups: Sequence[Sequence[int]]) -> None:
        self._decoders = decoders
        self._order = np.argsort([row for rows in groups for row in rows])

    def prepare(self) -> None:
        for decoder in self._decoders:
            decoder.prepare()

    def prefill(self) -> None:
        for decoder in self._decoders:
            decoder.prefill()

    def start_decode(self) -> None:
        for decoder in self._decoders:
            decoder.start_decode()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            for decoder in self._decoders:
                decoder.decode(1)

    def logits(self) -> np.ndarray:
        return np.concatenate([decoder.logits() for decoder in self._decoders])[self._order]

    def tokens(self, num: int) -> np.ndarray:
        return np.concatenate([decoder.tokens(num) for decoder in self._decoders])[self._order]


_ALL = 1 << 14
"""Permits for whatever steps are left."""


class PacedRunner(Runner):
    """The runtime's runner, which makes no step before it may."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.joins_prompts = True  # so that all rows begin to decode at the same time
        self.permits = threading.Semaphore(0)

    def step(self, rows: int) -> None:
        self.permits.acquire()
        super().step(rows)


class RuntimeDecoder:
    """The runtime's engine as services use it, its steps CUDA graphs where there is CUDA."""

    most_steps = None
    prepare = None

    def __init__(
        self, folder: Path, prompts: PromptBatch, device: Device, adapters: int, providers: Any
    ) -> None:
        """`adapters`: those in the graph's own slots, from 1 on."""
        self._prompts = prompts
        length = prompts.length + prompts.new_tokens + 2
        capture = device.kind == "cuda"
        self._runner = PacedRunner(
            folder, providers, capture, {}, prompts.rows, length, steps=StepFiles.of(folder)
        )
        content = [HostAdapter({}, {}, f"slot {slot}", 1.0, None) for slot in range(1 + adapters)]
        names = {str(slot): content[slot] for slot in range(1, 1 + adapters)}
        loaded = {name: int(name) for name in names}
        slots = Slots(max(1, adapters), loaded, names, _read_nothing, _write_nothing)
        quota = prompts.rows * prompts.length
        self._engine = RequestEngine(folder, self._runner, slots, frozenset(), quota=max(2, quota))
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


def _read_nothing(name: str) -> Blocks:
    raise AssertionError("every adapter is in the graph")


def _write_nothing(slot: int, blocks: Blocks) -> None:
    raise AssertionError("every adapter is in the graph")


class EagerDecoder:
    """transformers' model, perhaps in PEFT's wrapper; its cache grows from step to step."""

    most_steps = 8
    """Its steps cost the same, and it is slow: so many stand for all."""
    prepare = None

    def __init__(self, model: Any, prompts: PromptBatch, device: Device, **arguments: Any) -> None:
        """
        Args:
            arguments: of every call, such as PEFT's adapter_names.
        """
        self._model, self._arguments = model, {"use_cache": True, **arguments}
        self._prompt_ids = torch.from_numpy(prompts.ids).to(device.torch)
        self._state: Any = None
        self._chosen: list[Tensor] = []

    def prefill(self) -> None:
        self._state = self._model(input_ids=self._prompt_ids, **self._arguments)

    def start_decode(self) -> None:
        self.prefill()
        self._chosen = [self._state.logits[:, -1:].argmax(-1)]

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            cache = self._state.past_key_values
            self._state = self._model(
                input_ids=self._chosen[-1], past_key_values=cache, **self._arguments
            )
            self._chosen.append(self._state.logits[:, -1:].argmax(-1))

    def logits(self) -> np.ndarray:
        logits: np.ndarray = self._state.logits[:, -1].float().cpu().numpy()
        return logits

    def tokens(self, num: int) -> np.ndarray:
        return torch.cat(self._chosen, dim=1)[:, :num].cpu().numpy()
