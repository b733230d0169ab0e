"""What an answer's text has to be: a JSON schema, a regular expression or an EBNF grammar, as the
tokens that may come next. llguidance, an extra, knows which ones."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..contract.json_values import strict_json
from ..contract.listed import ListedFiles
from ..errors import ArtifactError, InputError, ProviderError, quoted

MOST_CHARACTERS = 65_536
"""Of a grammar: llguidance takes up to a second for one of so many, and four times as long for
twice as many."""
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Grammar:
    """All of an answer's text is to match it."""

    kind: Literal["json_schema", "regex", "ebnf"]
    """ebnf: in Lark's notation, from its rule `start` on."""
    text: str

    def check(self) -> None:
        """Raise InputError unless it has a known kind and a text of a bounded size."""
        if self.kind not in ("json_schema", "regex", "ebnf"):
            raise InputError(
                f"grammar.kind is {quoted(self.kind)}; expected 'json_schema', 'regex' or 'ebnf'"
            )
        if not isinstance(self.text, str) or not 0 < len(self.text) <= MOST_CHARACTERS:
            raise InputError(
                f"grammar.text is {quoted(self.text)}; expected a text of at most"
                f" {MOST_CHARACTERS:,} characters"
            )


class GrammarReader:
    """Grammars over the tokens of one model."""

    def __init__(
        self, files: ListedFiles, folder: str, vocabulary: int, ends: frozenset[int]
    ) -> None:
        """`folder`: of the decoder, in the artifact; its tokenizer is read when it is needed."""
        self._files = files
        self._path = f"{folder}/{TOKENIZER_FILE}"
        self._vocabulary = vocabulary
        self._ends = ends
        self._tokenizer: Any = None

    def open(self, grammar: Grammar) -> "Match":
        """The beginning of a text that is to match a grammar.

        It is compiled here, in the caller's thread, and what may come first is computed.

        Raises:
            ArtifactError: the tokenizer is gone, or damaged.
            InputError: the grammar is none, or too complex.
            ProviderError: llguidance is not installed.
        """
        try:
            import llguidance
        except ImportError as error:
            raise ProviderError(
                "a grammar needs llguidance: pip install 'loraexport-runtime[grammar]'"
            ) from error
        if self._tokenizer is None:
            self._tokenizer = self._read_tokenizer(llguidance)
        matcher: Any = llguidance.LLMatcher
        read: dict[str, Any] = {
            "json_schema": lambda text: matcher.grammar_from_json_schema(_read_schema(text)),
            "regex": matcher.grammar_from_regex,
            "ebnf": matcher.grammar_from_lark,
        }
        try:
            compiled = read[grammar.kind](grammar.text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"grammar: this is no {grammar.kind}: {error}") from error
        opened = matcher(self._tokenizer, compiled, log_level=0)
        if opened.is_error():
            raise InputError(f"grammar: this is no {grammar.kind}: {opened.get_error()}")
        return Match(opened, self._vocabulary, _read_bits(opened))

    def _read_tokenizer(self, llguidance: Any) -> Any:
        with self._files.open(self._path) as file:
            text = file.read().decode("utf-8", "replace")
        try:
            if not isinstance(json.loads(text), dict):  # a text that is no object were a name
                raise ValueError("it is no JSON object")
            return llguidance.LLTokenizer(
                text, n_vocab=self._vocabulary, eos_token=sorted(self._ends)
            )
        except (ValueError, RecursionError) as error:
            raise ArtifactError(
                f"{self._files.folder / self._path}: llguidance cannot read this tokenizer: {error}"
            ) from error


def _read_schema(text: str) -> dict[str, Any]:
    """llguidance pastes a schema that is a text into its own JSON, whatever the text ends."""
    schema = strict_json(text)
    if not isinstance(schema, dict):
        raise ValueError("it is no JSON object")
    return schema


class Match:
    """An answer's text so far, and what may follow; see sampling.Allowed."""

    def __init__(self, matcher: Any, vocabulary: int, bits: bytes | None = None) -> None:
        """`bits`: of `mask`, if they are known; llguidance bounds what computing them takes."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits = bits

    def copy(self) -> "Match":
        """Another text that begins as this one."""
        return Match(self._matcher.deep_copy(), self._vocabulary, self._bits)

    def mask(self) -> np.ndarray:
        """bool [vocabulary]: the tokens that may come next; those that end a text among them.

        Raises InputError: the grammar is too complex for that.
        """
        if self._bits is None:
            self._bits = _read_bits(self._matcher)
        allowed = np.unpackbits(np.frombuffer(self._bits, np.uint8), bitorder="little")
        return allowed.astype(bool)[: self._vocabulary]

    def accept(self, token: int) -> bool:
        """Go on from a token; whether the text is whole, and nothing may follow."""
        self._bits = None
        self._matcher.consume_token(token)
        return not self._matcher.is_error() and bool(self._matcher.is_stopped())


def _read_bits(matcher: Any) -> bytes:
    """A bit for each token that may come next. Raises InputError."""
    bits: bytes = matcher.compute_bitmask()
    if matcher.is_error():  # then a text might end here that does not match
        why = matcher.get_error().partition("\n")[0]
        raise InputError(f"grammar: it is too complex at this place of the answer: {why}")
    return bits
