"""An artifact of a decoder -> text, every prompt of a batch with its own adapter.

Runs on onnxruntime-genai (`pip install loraexport-runtime[genai]`), which keeps the KV cache,
samples, and knows the tokenizer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .batch import read_rows
from .errors import ArtifactError, InputError, ProviderError, UnknownAdapterError
from .manifest import Generator, Manifest, resolve
from .opening import open_artifact

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


def load_generator(
    path: str | Path, provider: str = "cpu", *, allow_unverified: bool = False
) -> "TextGenerator":
    """Open an artifact of `kind: causal_lm`.

    Args:
        path: the folder that `loraexport build` published.
        provider: `"cpu"` or `"cuda"`.
        allow_unverified: open an artifact whose parity failed or is still deferred.

    Raises:
        ArtifactError: it is no such artifact, a file is damaged, or parity has not passed.
        ProviderError: onnxruntime-genai is not installed, or the provider cannot run here.
    """
    folder = Path(path)

    def make(manifest: Manifest) -> TextGenerator:
        if manifest.generator is None:
            raise ArtifactError(f"{folder}: its kind is {manifest.kind!r}; open it with load()")
        return TextGenerator(folder, manifest, manifest.generator, provider)

    return open_artifact(folder, allow_unverified, make)


class TextGenerator:
    """A decoder and its adapters. Safe to use from threads: a call has a cache of its own.

    generator = load_generator("artifacts/smollm2")
    generator.generate(["Hi!", "Hi!"], adapters=["json", None])
    """

    def __init__(
        self, folder: Path, manifest: Manifest, generator: Generator, provider: str
    ) -> None:
        self.manifest = manifest
        self._og = _import_genai()
        where = resolve(folder, generator.folder)
        self._model = self._open(where, provider)
        self._pad = generator.pad_token_id
        config = json.loads((where / "genai_config.json").read_text(encoding="utf-8"))["model"]
        ends = config["eos_token_id"]
        self._ends = set(ends if isinstance(ends, list) else [ends])
        self._context = int(config["context_length"])
        self._vocabulary = int(config["vocab_size"])
        self._tokenizer = self._og.Tokenizer(self._model)
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
        slots = self._slots(adapters, len(prompts))
        tokens = [self._encode(prompt, index, chat) for index, prompt in enumerate(prompts)]
        options: dict[str, Any] = {"do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            if seed is not None:
                options["random_seed"] = seed
        generator = self._start(tokens, slots, max_new_tokens, options)
        return self._decode(generator, len(tokens), max_new_tokens, stop)

    def greedy(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None], steps: int
    ) -> np.ndarray:
        """The likeliest tokens of every prompt, int64 [batch, steps]; padding after a row's end."""
        tokens = [self._encode(prompt, index, False) for index, prompt in enumerate(prompts)]
        slots = self._slots(adapters, len(tokens))
        generator = self._start(tokens, slots, steps, {"do_sample": False})
        found = np.full((len(tokens), steps), self._pad, dtype=np.int64)
        for step in range(steps):
            if not generator.is_done():
                generator.generate_next_token()
                found[:, step] = generator.get_next_tokens()
        return found

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text."""
        return frozenset(self._ends)

    def _start(
        self, tokens: Sequence[list[int]], slots: np.ndarray, steps: int, options: dict[str, Any]
    ) -> Any:
        """A GenAI generator that has read the prompts."""
        longest = max(map(len, tokens))
        if longest + steps > self._context:
            raise InputError(
                f"a prompt of {longest} tokens and {steps} new ones are more than the model's"
                f" {self._context}; shorten the prompt, or lower max_new_tokens"
            )
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(batch_size=len(tokens), max_length=longest + steps, **options)
        generator = self._og.Generator(self._model, params)
        generator.set_model_input("adapter_ids", slots)
        # On the right: positions count from the first column.
        padded = np.full((len(tokens), longest), self._pad, dtype=np.int32)
        for index, own in enumerate(tokens):
            padded[index, : len(own)] = own
        generator.append_tokens(padded)
        return generator

    def _decode(
        self, generator: Any, batch: int, max_new_tokens: int, stop: Sequence[str]
    ) -> Iterator[Piece]:
        texts = [""] * batch
        streams = [self._tokenizer.create_stream() for _ in range(batch)]
        open_rows = set(range(batch))
        for _ in range(max_new_tokens):
            if not open_rows or generator.is_done():
                return
            generator.generate_next_token()
            step = np.array(generator.get_next_tokens())
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

    def _open(self, folder: Path, provider: str) -> Any:
        if provider not in ("cpu", "cuda"):
            raise ProviderError(f"provider: expected 'cpu' or 'cuda', got {provider!r}")
        if provider == "cuda" and not self._og.is_cuda_available():
            raise ProviderError(
                "CUDA was asked for, but this onnxruntime-genai has none; install"
                " onnxruntime-genai-cuda, or pass provider='cpu'"
            )
        config = self._og.Config(str(folder))
        config.clear_providers()
        if provider == "cuda":
            config.append_provider("cuda")
        try:
            return self._og.Model(config)
        except Exception as error:
            raise ProviderError(
                f"{folder}: onnxruntime-genai {self._og.__version__} cannot open it on {provider}:"
                f" {error}"
            ) from error


def _check(prompts: Any, max_new_tokens: int, stop: Any) -> None:
    if isinstance(prompts, str):
        raise InputError("prompts is one text; expected a list of prompts")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
    if isinstance(stop, str) or not all(isinstance(one, str) and one for one in stop):
        raise InputError(f"stop is {stop!r}; expected a list of texts, none of them empty")


def _import_genai() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise ProviderError(
            "generation needs onnxruntime-genai: pip install 'loraexport-runtime[genai]'"
        ) from error
    return onnxruntime_genai
