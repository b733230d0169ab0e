"""An artifact of a decoder -> text, every prompt of a batch with its own adapter.

The face of the engine for whoever has texts and wants texts; `engine` is there for services.
"""

import logging
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, Self

import numpy as np

from ..contract.files import resolve
from ..contract.genai_config import read_genai_config
from ..contract.kinds import Decoder
from ..contract.listed import ListedFiles
from ..contract.manifest import Manifest
from ..errors import InputError
from ..slots.batch import RowAdapters, read_rows
from ..slots.gate import Gate
from ..slots.hosted import HostsAdapters
from .answers import Completion, Piece
from .engine import GenerationEngine
from .handle import GenerationHandle
from .options import Options
from .prompts import Prompt, PromptReader, require_prompts
from .request import GenerationRequest
from .text.defaults import GenerationDefaults
from .text.stream import TextStream
from .text.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)


class TextGenerator(HostsAdapters):
    """A decoder and its adapters.

    with load_generator("artifacts/smollm2") as generator:
        generator.generate(["Hi!", "Hi!"], adapters=["json", None])

    Threads: every method may be called from any thread, at the same time as any other; one thread
    of the generator computes all calls together. One stream is read by one thread at a time.
    `close` waits for the calls of `generate`, `greedy` and `warm_up` that have begun; the next
    piece of a stream raises ClosedError, as every later call does.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        decoder: Decoder,
        providers: list[tuple[str, dict[str, Any]]],
        cuda_graphs: bool = False,
        **sizes: Any,
    ) -> None:
        """`sizes`: of the engine, see GenerationEngine."""
        self.folder = folder
        self.manifest = manifest
        where = resolve(folder, decoder.folder)
        config = read_genai_config(where)
        files = ListedFiles(folder, manifest.files)
        self.defaults = GenerationDefaults.read(files, decoder.folder, config)
        """How it generates where a call says nothing else."""
        self.tokenizer = Tokenizer.read(files, decoder.folder)
        """Of texts and chats."""
        self._prompts = PromptReader(self.tokenizer, int(config["model"]["vocab_size"]))
        self.engine = GenerationEngine(
            folder,
            manifest,
            decoder,
            providers,
            capture=cuda_graphs,
            open_text=partial(TextStream, self.tokenizer),
            **sizes,
        )
        self._host = self.engine.host
        self._gate = Gate(f"the generator of {folder}", "open the artifact again")

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return self.engine.ends

    def generate(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[RowAdapters] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """The completion of every prompt; arguments and errors as of `stream`."""
        with self._gate.entry(), self._gate:
            pieces = self._start(prompts, adapters, Options(**options))
            texts = [""] * len(prompts)
            tokens: list[list[int]] = [[] for _ in prompts]
            reasons: list[Literal["stop", "length"]] = ["length"] * len(prompts)
            for piece in pieces:
                texts[piece.row] += piece.text
                if piece.token is not None:
                    tokens[piece.row].append(piece.token)
                reasons[piece.row] = piece.finish_reason or "length"
        rows = zip(texts, tokens, reasons, strict=True)
        return [Completion(text, tuple(ids), reason) for text, ids, reason in rows]

    def stream(
        self,
        prompts: Sequence[Prompt],
        adapters: Sequence[RowAdapters] | None = None,
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        suppress_tokens: Sequence[int] | None = None,
        no_repeat_ngram_size: int | None = None,
        bad_words_ids: Sequence[Sequence[int]] | None = None,
        min_new_tokens: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] | None = None,
        chat: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
    ) -> Iterator[Piece]:
        """The tokens of every row as they come, until its end-of-text token or a stop string.

        What is None is as the model's generation_config.json has it (`defaults`).

        Args:
            prompts: of any lengths; a text is the user's message of the chat template, if the
                tokenizer has one and `chat` is true, and else begins with its special tokens.
            adapters: a name for each prompt, None for the base, or weights by name where the
                artifact was built with `export: {blend: true}`; default: all None.
            max_new_tokens: of each row; 128 if the config has none.
            temperature: 0 takes the likeliest token always, else top_k, top_p and min_p choose.
            repetition_penalty: divides the logits above 0 of the tokens of prompt and answer, and
                multiplies the others.
            suppress_tokens: ids of which none comes.
            no_repeat_ngram_size: so many tokens in a row do not come that prompt and answer have.
            bad_words_ids: lists of ids of which none comes whole.
            min_new_tokens: neither a token nor a text ends a shorter answer.
            seed: of the sampling, with the row's number; default: another one each time.
            stop: a row ends where its text holds one of these.
            tools: for the chat template: JSON schemas of functions.
            documents: for it too: `{"title": …, "text": …}` each.
            template_arguments: other variables of it, such as `{"enable_thinking": False}`, and
                `chat_template`, the name of one of several.

        Raises:
            BatchError: UnknownAdapterError, QueueFullError, or InputError for a prompt that cannot
                be run.
            ClosedError: the generator is closed, maybe since the last token.
        """
        options = Options(
            max_new_tokens,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            suppress_tokens,
            no_repeat_ngram_size,
            bad_words_ids,
            min_new_tokens,
            seed,
            stop,
            chat,
            tools,
            documents,
            template_arguments,
        )
        with self._gate.entry(), self._gate:
            pieces = self._start(prompts, adapters, options)
        return self._checked(pieces)

    def greedy(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapters], steps: int
    ) -> np.ndarray:
        """The likeliest tokens of every prompt, int64 [batch, steps]; -1 after a row's end."""
        with self._gate.entry(), self._gate:
            require_prompts(prompts)
            tokens = self._prompts.read(prompts, Options(chat=False))
            requests = [{"max_tokens": steps, "ignore_eos": True}] * len(tokens)
            handles = self._submit(tokens, adapters, requests)
            likeliest = np.full((len(tokens), steps), -1, dtype=np.int64)
            for row, handle in enumerate(handles):
                found = np.array([one.token for one in handle.result().answers[0].tokens])
                over = np.flatnonzero(np.isin(found, list(self.ends)))
                end = int(over[0]) + 1 if len(over) else steps
                likeliest[row, :end] = found[:end]
            return likeliest

    def warm_up(self, rows: int | None = None) -> None:
        """Prepare the steps of up to so many rows, which captures them with CUDA graphs.

        Args:
            rows: default: all of the engine's.

        Raises:
            InputError: it is no number from 1 on.
            ClosedError: the generator is closed.
        """
        with self._gate.entry(), self._gate:
            self.engine.warm_up(rows)

    def close(self) -> None:
        """End the generator: wait for the calls that have begun, then give memory and thread up.

        Every later call raises ClosedError, but for this one, which does nothing then. Streams that
        are still open end with that error too. `with load_generator(…) as generator:` closes it.
        """
        self._gate.close(self._give_up)

    def _give_up(self) -> None:
        self.engine.close()
        self.tokenizer.close()

    def __enter__(self) -> Self:
        self._gate.check()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(
        self, prompts: Sequence[Prompt], adapters: Sequence[RowAdapters] | None, options: Options
    ) -> Generator[Piece, None, None]:
        require_prompts(prompts)
        options.check()
        read_rows(adapters, len(prompts))
        if not prompts:
            raise InputError("no prompt; give one at least")
        tokens = self._prompts.read(prompts, options)
        requests = options.requests(tokens, self.defaults, self.engine.length)
        handles = self._submit(tokens, adapters, requests)
        texts = [
            TextStream(self.tokenizer, request["stop"], request["min_tokens"])
            for request in requests
        ]
        return self._pieces(handles, texts)

    def _submit(
        self,
        tokens: Sequence[list[int]],
        adapters: Any,
        requests: Sequence[Mapping[str, Any]],
    ) -> list[GenerationHandle]:
        """A request for each prompt, all or none."""
        names = read_rows(adapters, len(tokens))
        every = []
        for row, (prompt, name) in enumerate(zip(tokens, names, strict=True)):
            every.append(GenerationRequest(tokens=prompt, adapter=name, **requests[row]))
        return self.engine.submit_all(every)

    def _pieces(
        self, handles: Sequence[GenerationHandle], texts: Sequence[TextStream]
    ) -> Generator[Piece, None, None]:
        """The tokens of all, in the order of their coming; whoever stops reading cancels them."""
        arrived: SimpleQueue[int] = SimpleQueue()
        for row, handle in enumerate(handles):
            handle.listen(partial(arrived.put, row))
        at, open_rows = [0] * len(handles), set(range(len(handles)))
        try:
            while open_rows:
                row = arrived.get()
                fresh, is_done = handles[row].fresh(at[row])
                for told in fresh:
                    at[row] += 1
                    yield Piece(row, told.token, texts[row].push(told.token))
                if is_done and row in open_rows:
                    open_rows.discard(row)
                    reason = handles[row].result().answers[0].finish_reason
                    text = texts[row].finish()
                    stopped = reason == "stop" or texts[row].stopped is not None
                    yield Piece(row, None, text, "stop" if stopped else "length")
        finally:
            for row in open_rows:
                handles[row].cancel()

    def _checked(self, pieces: Generator[Piece, None, None]) -> Iterator[Piece]:
        """The same pieces, and ClosedError once the generator is closed."""
        while True:
            self._gate.check()
            piece = next(pieces, None)
            if piece is None:
                return
            yield piece
