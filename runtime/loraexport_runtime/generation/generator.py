"""An artifact of a decoder -> text, every prompt of a batch with its own adapter.

Runs on onnxruntime-genai (`pip install loraexport-runtime[genai]`), which keeps the KV cache,
samples, and knows the tokenizer; with CUDA graphs it is the tokenizer alone, and an engine of our
own drives the graph.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from weakref import WeakSet

import numpy as np

from ..contract.files import resolve
from ..contract.genai_config import end_tokens, read_genai_config
from ..contract.kinds import Decoder
from ..contract.manifest import FORMAT_VERSION, Manifest
from ..errors import InputError, ProviderError, UnknownAdapterError
from ..slots.batch import read_rows
from ..slots.gate import Gate
from .captured.engine import DrivenEngine
from .engine import Engine, Sampling
from .genai import GenaiEngine, open_tokenizer
from .prompts import Prompt, PromptReader

_LOG = logging.getLogger(__name__)


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
    """A decoder and its adapters.

    with load_generator("artifacts/smollm2") as generator:
        generator.generate(["Hi!", "Hi!"], adapters=["json", None])

    Threads: every method may be called from any thread, at the same time as any other; each call
    has a cache of its own. With CUDA graphs one thread of the generator computes all calls, step
    by step in turn. One stream is read by one thread at a time. `close` waits for the calls of
    `generate`, `greedy` and `warm_up` that have begun, and for the step of a stream that is being
    computed; the next piece of that stream raises ClosedError, as every later call does.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        decoder: Decoder,
        providers: list[tuple[str, dict[str, Any]]],
        cuda_graphs: bool = False,
    ) -> None:
        """`cuda_graphs` on another device than CUDA: the same engine, which captures nothing."""
        if cuda_graphs and manifest.format_version < FORMAT_VERSION:
            raise ProviderError(
                f"{folder}: its format is {manifest.format_version}, and a decoder opens with CUDA"
                f" graphs from format {FORMAT_VERSION} on; build it again, or pass no cuda_graphs"
            )
        self.folder = folder
        self.manifest = manifest
        where = resolve(folder, decoder.folder)
        config = read_genai_config(where)["model"]
        self._pad = decoder.pad_token_id
        self._ends = set(end_tokens(config))
        self._context = int(config["context_length"])
        self._tokenizer = open_tokenizer(where)
        vocabulary = int(config["vocab_size"])
        self._prompts = PromptReader(self._tokenizer, vocabulary, self._pad, self._context)
        self._engine: Engine
        if cuda_graphs:
            self._engine = DrivenEngine(where, self._pad, providers)
        else:
            self._engine = GenaiEngine(where, self._pad, providers)
        self._gate = Gate(f"the generator of {folder}", "open the artifact again")
        self._streams: WeakSet[Generator[Piece, None, None]] = WeakSet()

    @property
    def adapters(self) -> dict[str, int]:
        """The adapters that a prompt may name, name -> slot."""
        every = self.manifest.adapters
        return {entry.name: entry.slot for entry in every if entry.slot is not None}

    def generate(self, prompts: Sequence[Prompt], **options: Any) -> list[Completion]:
        """The completion of every prompt; arguments and errors as of `stream`."""
        stop = options.get("stop", ())
        texts = [""] * len(prompts)
        tokens: list[list[int]] = [[] for _ in prompts]
        limit = int(options.get("max_new_tokens", 128))
        with self._gate:
            for piece in self._start(prompts, **options):
                texts[piece.row] += piece.text
                tokens[piece.row].append(piece.token)
        completions = []
        for text, ids in zip(texts, tokens, strict=True):
            cut = min((text.find(end) for end in stop if end in text), default=len(text))
            stopped = cut < len(text) or len(ids) < limit
            completions.append(Completion(text[:cut], tuple(ids), "stop" if stopped else "length"))
        return completions

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
            ClosedError: the generator is closed, maybe since the last token.
        """
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
            "stop": stop,
            "chat": chat,
        }
        with self._gate:
            pieces = self._start(prompts, adapters, **options)
            self._streams.add(pieces)
        return self._gated(pieces)

    def greedy(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], steps: int
    ) -> np.ndarray:
        """The likeliest tokens of every prompt, int64 [batch, steps]; padding after a row's end."""
        with self._gate:
            slots = self._slots(adapters, len(prompts))
            tokens = self._prompts.read(prompts, steps, chat=False)
            likeliest = np.full((len(tokens), steps), self._pad, dtype=np.int64)
            is_open = np.ones(len(tokens), dtype=bool)
            for step, chosen in enumerate(self._engine.start(tokens, slots, steps, Sampling())):
                likeliest[is_open, step] = chosen[is_open]
                is_open &= ~np.isin(chosen, list(self._ends))
                if not is_open.any():
                    break
            return likeliest

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
        with self._gate:
            self._engine.warm_up(rows, length)

    def close(self) -> None:
        """End the generator: wait for the calls that have begun, then give up memory and thread.

        Every later call raises ClosedError, but for this one, which does nothing then. Streams that
        are still open end with that error too. `with load_generator(…) as generator:` closes it.
        """
        if not self._gate.close():
            return
        for pieces in list(self._streams):
            pieces.close()
        self._engine.close()
        _LOG.info("closed %s", self.folder)

    def __enter__(self) -> Self:
        self._gate.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return frozenset(self._ends)

    def _start(
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
    ) -> Generator[Piece, None, None]:
        _check(prompts, max_new_tokens, stop)
        sampling = Sampling(temperature, top_k, top_p, seed)
        _check_sampling(sampling)
        slots = self._slots(adapters, len(prompts))
        tokens = self._prompts.read(prompts, max_new_tokens, chat)
        steps = self._engine.start(tokens, slots, max_new_tokens, sampling)
        return self._decode(steps, len(tokens), stop)

    def _gated(self, pieces: Generator[Piece, None, None]) -> Iterator[Piece]:
        """The same pieces; the generator may be closed between two of them."""
        while True:
            with self._gate:
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def _decode(
        self, steps: Iterator[np.ndarray], batch: int, stop: Sequence[str]
    ) -> Generator[Piece, None, None]:
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
                if any(end in texts[row] for end in stop):
                    open_rows.discard(row)
                yield Piece(row, token, text)
            if not open_rows:
                return

    def _slots(self, adapters: Any, batch: int) -> np.ndarray:
        if batch == 0:
            raise InputError("no prompt; give one at least")
        slots, loaded = [], self.adapters
        for index, row in enumerate(read_rows(adapters, batch)):
            if isinstance(row, Mapping):
                raise InputError(f"adapters[{index}] is a blend; a decoder takes one name per row")
            if row is not None and row not in loaded:
                raise UnknownAdapterError(
                    f"adapter {row!r} is not in this artifact; it has {', '.join(loaded)}"
                )
            slots.append(0 if row is None else loaded[row])
        return np.array(slots, dtype=np.int64)


def _check(prompts: Any, max_new_tokens: int, stop: Any) -> None:
    if isinstance(prompts, str):
        raise InputError("prompts is one text; expected a list of prompts")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if isinstance(stop, str) or not all(isinstance(end, str) and end for end in stop):
        raise InputError(f"stop is {stop!r}; expected a list of texts, none of them empty")


def _check_sampling(sampling: Sampling) -> None:
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise InputError(
            f"top_k is {sampling.top_k} and top_p {sampling.top_p}; expected a top_k of 0 (all"
            " tokens) or more, and a top_p above 0, up to 1"
        )
