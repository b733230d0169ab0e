"""An artifact of a decoder -> text, every prompt of a batch with its own adapter.

Runs on onnxruntime-genai (`pip install loraexport-runtime[genai]`), which keeps the KV cache,
samples, and knows the tokenizer; with CUDA graphs it is the tokenizer alone, and an engine of our
own drives the graph.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..contract.files import resolve
from ..contract.genai_config import end_tokens, read_genai_config
from ..contract.kinds import Decoder
from ..contract.manifest import FORMAT_VERSION, Manifest
from ..errors import InputError, ProviderError, UnknownAdapterError
from ..slots.batch import read_rows
from .captured.engine import DrivenEngine
from .engine import Engine, Sampling
from .genai import GenaiEngine, open_tokenizer

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or the messages of a chat: `[{"role": "user", "content": …}]`."""


@dataclass(frozen=True)
class Piece:
    """One token of one row, as it comes."""

    row: int
    token: int
    text: str
    """Empty while a character is not whole yet."""


@dataclass(frozen=True)
class Completion:
    """What one prompt gave, without the end-of-text token; the text without the stop string too."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]


class TextGenerator:
    """A decoder and its adapters. Safe to use from threads: a call has a cache of its own.

    generator = load_generator("artifacts/smollm2")
    generator.generate(["Hi!", "Hi!"], adapters=["json", None])
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        decoder: Decoder,
        provider: str,
        cuda_graphs: bool = False,
    ) -> None:
        if cuda_graphs and manifest.format_version < FORMAT_VERSION:
            raise ProviderError(
                f"{folder}: its format is {manifest.format_version}, and a decoder opens with CUDA"
                f" graphs from format {FORMAT_VERSION} on; build it again, or pass no cuda_graphs"
            )
        self.manifest = manifest
        where = resolve(folder, decoder.folder)
        self._pad = decoder.pad_token_id
        self._tokenizer = open_tokenizer(where)
        self._engine: Engine
        if cuda_graphs:
            self._engine = DrivenEngine(where, self._pad, provider, capture=provider == "cuda")
        else:
            self._engine = GenaiEngine(where, self._pad, provider)
        config = read_genai_config(where)["model"]
        self._ends = set(end_tokens(config))
        self._context = int(config["context_length"])
        self._vocabulary = int(config["vocab_size"])
        self._has_template = self._finds_template()

    @property
    def adapters(self) -> dict[str, int]:
        """The adapters that a prompt may name, name -> slot."""
        every = self.manifest.adapters
        return {entry.name: entry.slot for entry in every if entry.slot is not None}

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
        """The completion of every prompt; arguments as of `stream`."""
        stop = options.get("stop", ())
        texts = [""] * len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        limit = int(options.get("max_new_tokens", 128))
        for piece in self.stream(prompts, **options):
            texts[piece.row] += piece.text
            tokens[piece.row].append(piece.token)
        found = []
        for text, own in zip(texts, tokens, strict=True):
            cut = min((text.find(one) for one in stop if one in text), default=len(text))
            stopped = cut < len(text) or len(own) < limit
            found.append(Completion(text[:cut], tuple(own), "stop" if stopped else "length"))
        return found

    def stream(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[str | None] | None = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 50,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        chat: bool = True,
    ) -> Iterator[Piece]:
        """The tokens of every row as they come, until its end-of-text token or a stop string.

        Args:
            prompts: of any lengths; a text is the user's message of the chat template, if the
                tokenizer has one and `chat` is true.
            adapters: a name for each prompt, None for the base; default: all None.
            max_new_tokens: of each row.
            temperature: 0 takes the likeliest token always, else top_k and top_p choose.
            seed: of the sampling; default: another one each time.
            stop: a row ends where its text holds one of these.

        Raises:
            BatchError: UnknownAdapterError, or InputError for a prompt that cannot be run.
        """
        _check(prompts, max_new_tokens, stop)
        sampling = Sampling(temperature, top_k, top_p, seed)
        _check_sampling(sampling)
        slots = self._slots(adapters, len(prompts))
        tokens = [self._encode(prompt, index, chat) for index, prompt in enumerate(prompts)]
        self._check_length(max(map(len, tokens)), max_new_tokens)
        steps = self._engine.start(tokens, slots, max_new_tokens, sampling)
        return self._decode(steps, len(tokens), stop)

    def greedy(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], steps: int
    ) -> np.ndarray:
        """The likeliest tokens of every prompt, int64 [batch, steps]; padding after a row's end."""
        tokens = [self._encode(prompt, index, False) for index, prompt in enumerate(prompts)]
        slots = self._slots(adapters, len(tokens))
        self._check_length(max(map(len, tokens)), steps)
        found = np.full((len(tokens), steps), self._pad, dtype=np.int64)
        is_open = np.ones(len(tokens), dtype=bool)
        for step, chosen in enumerate(self._engine.start(tokens, slots, steps, Sampling())):
            found[is_open, step] = chosen[is_open]
            is_open &= ~np.isin(chosen, list(self._ends))
            if not is_open.any():
                break
        return found

    def warm_up(self, rows: int, length: int) -> None:
        """Capture the steps of batches of up to so many rows ahead of the first one.

        Without CUDA graphs it does nothing.

        Args:
            rows: and one graph serves all that round up to the same power of two.
            length: of the longest prompt and its new tokens together, rounded up to 256.
        """
        if rows < 1 or not 2 <= length <= self._context:
            raise InputError(
                f"{rows} rows of {length} tokens; expected 1 row or more, of 2 to {self._context}"
            )
        self._engine.warm_up(rows, length)

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return frozenset(self._ends)

    def _check_length(self, longest: int, steps: int) -> None:
        if longest + steps > self._context:
            raise InputError(
                f"a prompt of {longest} tokens and {steps} new ones are more than the model's"
                f" {self._context}; shorten the prompt, or lower max_new_tokens"
            )

    def _decode(
        self, steps: Iterator[np.ndarray], batch: int, stop: Sequence[str]
    ) -> Iterator[Piece]:
        texts = [""] * batch
        streams = [self._tokenizer.create_stream() for _ in range(batch)]
        open_rows = set(range(batch))
        for step in steps:
            for row in sorted(open_rows):
                token = int(step[row])
                if token in self._ends:
                    open_rows.discard(row)
                    continue
                text = streams[row].decode(token)
                texts[row] += text
                if any(one in texts[row] for one in stop):
                    open_rows.discard(row)
                yield Piece(row, token, text)
            if not open_rows:
                return

    def _slots(self, adapters: Any, batch: int) -> np.ndarray:
        if batch == 0:
            raise InputError("no prompt; give one at least")
        slots, known = [], self.adapters
        for index, row in enumerate(read_rows(adapters, batch)):
            if isinstance(row, Mapping):
                raise InputError(f"adapters[{index}] is a blend; a decoder takes one name per row")
            if row is not None and row not in known:
                raise UnknownAdapterError(
                    f"adapter {row!r} is not in this artifact; it has {', '.join(known)}"
                )
            slots.append(0 if row is None else known[row])
        return np.array(slots, dtype=np.int64)

    def _encode(self, prompt: Prompt, index: int, chat: bool) -> list[int]:
        if not isinstance(prompt, str) and not (prompt and isinstance(prompt[0], Mapping)):
            tokens = [int(token) for token in prompt]  # type: ignore[arg-type]
        else:
            text = self._text(prompt, index, chat)
            tokens = [int(token) for token in self._tokenizer.encode(text)]
        if not tokens:
            raise InputError(f"prompts[{index}] has no tokens")
        if min(tokens) < 0 or max(tokens) >= self._vocabulary or self._pad in tokens:
            raise InputError(
                f"prompts[{index}]: tokens range from {min(tokens)} to {max(tokens)}; expected 0 to"
                f" {self._vocabulary - 1} without {self._pad}, which stands for padding"
            )
        return tokens

    def _text(self, prompt: Any, index: int, chat: bool) -> str:
        if isinstance(prompt, str) and not (chat and self._has_template):
            return prompt
        if not self._has_template:
            raise InputError(
                f"prompts[{index}] is a chat, but the tokenizer has no chat template; give text"
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self._apply_template(list(messages))

    def _apply_template(self, messages: list[Any]) -> str:
        text: str = self._tokenizer.apply_chat_template(
            messages=json.dumps(messages), add_generation_prompt=True
        )
        return text

    def _finds_template(self) -> bool:
        try:
            self._apply_template([{"role": "user", "content": "x"}])
        except Exception:  # onnxruntime-genai has no way to ask
            return False
        return True


def _check(prompts: Any, max_new_tokens: int, stop: Any) -> None:
    if isinstance(prompts, str):
        raise InputError("prompts is one text; expected a list of prompts")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
        raise InputError(f"stop is {stop!r}; expected a list of texts, none of them empty")


def _check_sampling(sampling: Sampling) -> None:
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise InputError(
            f"top_k is {sampling.top_k} and top_p {sampling.top_p}; expected a top_k of 0 (all"
            " tokens) or more, and a top_p above 0, up to 1"
        )
