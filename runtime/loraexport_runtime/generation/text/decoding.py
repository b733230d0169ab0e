"""Tokens one by one -> the text that no later token changes: together what the whole decodes to.

A decoder of the tokenizers library looks at little at a time: at the first token of a text, at the
bytes of one character, at the bytes in a row that stand for no token of their own. So a window of
the last tokens is decoded, and it begins where a cut changes nothing.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .tokenizer import Tokenizer

_WINDOW, _CONTEXT = 32, 4
"""Tokens that are decoded again and again; and those of them that a new window begins with."""
_LOCAL = {"ByteLevel", "ByteFallback", "Metaspace", "BPEDecoder", "WordPiece", "Replace", "Strip"}
"""Decoders that look at a token and its neighbours; those after Fuse see the whole text."""
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BROKEN = "\ufffd"
"""What bytes that are no character become; the last ones may be half of one."""


class Decoding:
    """The text of one sequence of tokens, as it grows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = list(_kinds(tokenizer.layout["decoder"]))
        self._falls_back = any(part.get("type") == "ByteFallback" for part in kinds)
        self._is_local = _are_local(kinds)
        self._hidden = {
            token.get("id") for token in tokenizer.layout["added_tokens"] or () if token["special"]
        }
        self._ids: list[int] = []
        """Of the window."""
        self._length = 0
        """The characters of the window's text that were given."""

    def push(self, token: int) -> str:
        """The text that is settled with this token, beyond what was given."""
        written = self._tokenizer.token(token)
        if written is None or token in self._hidden:
            return ""  # as if it were not there
        self._ids.append(token)
        is_byte = self._falls_back and _BYTE.fullmatch(written)
        if not self._is_local or is_byte:
            return ""  # bytes in a row are a text together, or none of them is
        whole = self._tokenizer.decode_raw(self._ids)
        end = len(whole) - whole.endswith(_BROKEN)
        text = whole[self._length : end]
        self._length = max(self._length, end)
        if len(self._ids) > _WINDOW and end == len(whole):
            self._cut(whole)
        return text

    def finish(self) -> str:
        """What is left, once no token comes any more."""
        whole = self._tokenizer.decode_raw(self._ids) if self._ids else ""
        text = whole[self._length :]
        self._length = len(whole)
        return text

    def _cut(self, whole: str) -> None:
        """Begin the window later, where its text goes on as it would have."""
        ids = self._ids[-_CONTEXT:]
        text = self._tokenizer.decode_raw(ids)
        if text.strip(f" {_BROKEN}") and whole.endswith(text) and text[0] != _BROKEN:
            self._ids, self._length = ids, len(text)


def _kinds(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """A decoder's parts in order; none: tokens are joined by spaces."""
    if decoder is None:
        return
    if decoder.get("type") == "Sequence":
        for part in decoder.get("decoders", ()):
            yield from _kinds(part)
    else:
        yield decoder


def _are_local(parts: list[Mapping[str, Any]]) -> bool:
    """Whether more tokens change no text but the end of what is there."""
    kinds = [part.get("type") for part in parts]
    fused = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    return set(kinds[:fused]) <= _LOCAL and set(kinds[fused + 1 :]) <= {"Strip"}
