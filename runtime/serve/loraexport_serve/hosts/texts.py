"""Texts and pairs of texts -> token ids as an encoder takes them; cut only where that is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import tokenizers

from loraexport_runtime.contract.listed import ListedFiles
from loraexport_runtime.errors import ArtifactError
from loraexport_runtime.generation.text.files import TOKENIZER, read_config, read_listed

from ..errors import ApiError, invalid


@dataclass(frozen=True)
class Tokens:
    """A text's, or a pair's, as a model takes them."""

    ids: list[int]
    kinds: list[int]
    """token_type_ids: 0 of the first text, 1 of the second."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Of the text's characters, by token; (0, 0) of one that the model has put there."""


class TextEncoder:
    """The tokenizer in an artifact's folder. Any thread may call."""

    def __init__(self, backend: Any, limit: int | None, cuts_left: bool) -> None:
        """`limit`: tokens of a text that the model takes, with those around it."""
        self._backend = backend
        self._cuts_left = cuts_left
        self.limit = limit
        self.vocabulary: int = backend.get_vocab_size()
        self._known: dict[int, str] = {}
        added = backend.get_added_tokens_decoder()
        self._special = {index for index, token in added.items() if token.special}

    @classmethod
    def read(cls, files: ListedFiles, folder: str, limit: int | None) -> Self | None:
        """That of a folder of an artifact, held to its digest; None if there is none.

        Raises:
            ArtifactError: a file is damaged.
        """
        path = f"{folder}/{TOKENIZER}"
        if path not in files:
            return None
        config, _ = read_config(files, folder)
        try:
            backend = tokenizers.Tokenizer.from_buffer(read_listed(files, path))
        except Exception as error:  # the library raises nothing more special
            raise ArtifactError(
                f"{files.folder / path}: no tokenizer that the tokenizers library reads: {error};"
                " build the artifact again"
            ) from error
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, limit, config.get("truncation_side") == "left")

    def encode(
        self,
        texts: Sequence[str | tuple[str, str]],
        *,
        cut: int | None = None,
        special: bool = True,
        param: str = "input",
        most_second: int | None = None,
    ) -> list[Tokens]:
        """The tokens of each.

        Args:
            cut: tokens to cut longer ones to, by a pair's longer text first; None: refuse those
                that the model does not take.
            special: with the tokens that the model has around a text.
            param: what the texts are in the request, for an error.
            most_second: tokens that the second text of a pair keeps at most.

        Raises:
            ApiError: 400: a text is too long, or is none.
        """
        if most_second is None:
            encodings = self._encode_batch(texts, special, param)
        else:
            encodings = [self._cut(text, None, special, most_second) for text in texts]
        rows = []
        for index, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
            if cut is not None and len(encoding) > cut:
                encoding = self._cut(text, cut, special, most_second)
            else:
                check_length(len(encoding), self.limit, index, param)
            rows.append(Tokens(encoding.ids, encoding.type_ids, encoding.offsets))
        return rows

    def ids(self, text: str, *, special: bool) -> list[int]:
        """The ids of a text of any length. Raises ApiError (400)."""
        ids: list[int] = self._encode_batch([text], special, "prompt")[0].ids
        return ids

    def _encode_batch(
        self, texts: Sequence[str | tuple[str, str]], special: bool, param: str
    ) -> list[Any]:
        try:
            encodings: list[Any] = self._backend.encode_batch(
                list(texts), add_special_tokens=special
            )
        except Exception as error:  # half a surrogate pair, or what it has no token for
            raise invalid(f"{param}: a text cannot be encoded: {error}", param) from error
        return encodings

    def prompt_length(self, prompt: str) -> int:
        """The tokens of a prompt with what begins a text, but not what ends one."""
        ids = self._backend.encode(prompt).ids
        return len(ids) - bool(ids and ids[-1] in self._special)

    def decode(self, ids: Sequence[int], *, special: bool = True) -> str:
        """The text of ids. Args: special: with special tokens."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=not special)
        return text

    def text_of(self, token: int) -> str:
        """The text of one token by itself, known from its first time on."""
        if token not in self._known:
            self._known[token] = self.decode([token])
        return self._known[token]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """How the vocabulary writes each id."""
        return [self._backend.id_to_token(index) or "" for index in ids]

    def _cut(
        self,
        text: str | tuple[str, str],
        limit: int | None,
        special: bool,
        most_second: int | None,
    ) -> Any:
        """As transformers' truncation=True: of a pair the longer text loses a token at a time."""
        parts = [text] if isinstance(text, str) else list(text)
        encodings = [self._backend.encode(part, add_special_tokens=False) for part in parts]
        lengths = [len(one.ids) for one in encodings]
        if most_second is not None and len(lengths) == 2:
            lengths[1] = min(lengths[1], most_second)
        if limit is not None:
            around = self._backend.num_special_tokens_to_add(len(parts) == 2) if special else 0
            if limit - around < len(parts):
                raise invalid(
                    f"truncate_prompt_tokens is {limit}, and {around} tokens stand around a text;"
                    " raise it",
                    "truncate_prompt_tokens",
                )
            lengths = _shares(lengths, limit - around)
        for encoding, size in zip(encodings, lengths, strict=True):
            encoding.truncate(size, direction="left" if self._cuts_left else "right")
        return self._backend.post_process(*encodings, add_special_tokens=special)


def check_length(length: int, limit: int | None, index: int, param: str = "input") -> None:
    """Raise ApiError (400) for a text of more tokens than the model takes."""
    if limit is not None and length > limit:
        raise ApiError(
            400,
            f"This model's maximum context length is {limit} tokens. However, {param}[{index}] has"
            f" {length} tokens. Shorten it, or pass truncate_prompt_tokens.",
            code="context_length_exceeded",
            param=param,
        )


def _shares(lengths: list[int], room: int) -> list[int]:
    """How many tokens each part keeps: the longer one is cut until both are as long."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    first, second = lengths
    if first + second <= room:
        return lengths
    if first <= room // 2:
        return [first, room - first]
    if second <= room // 2:
        return [room - second, second]
    return [room - room // 2, room // 2]
