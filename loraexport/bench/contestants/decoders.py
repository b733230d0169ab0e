"""Ways to decode greedily: onnxruntime-genai and eager torch; runtime_decoder has the runtime's own
engine, plain_decoder plain onnxruntime.

Each reads the prompts (`prefill`), and then makes one token per row and step (`decode`). The
prompts are the same each time: the weights that a step reads push them out of any cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

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
