"""What a request asks of the engine, held to what it may be."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import InputError, quoted
from ..slots.batch import RowAdapters, is_weight
from .grammar import Grammar
from .sampling import Sampling

MOST_ANSWERS = 128
MOST_LOGPROBS = 64
MOST_STOPS = 64
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class GenerationRequest(Sampling):
    """Tokens to go on from, whose adapter to use, and how.

    Numbers may be numpy's, and tokens a numpy array or a tensor.
    """

    tokens: Sequence[int]
    """The prompt, one token at least."""
    adapter: RowAdapters = None
    """A name, or the weights of several or of one: `{"sql": 0.5}`; None: the base."""
    max_tokens: int = 128
    """New tokens of each answer."""
    min_tokens: int = 0
    """Neither a token nor a text ends an answer that is shorter."""
    stop: Sequence[str] = ()
    """An answer ends where its text holds one of these."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end an answer beside the model's own; none of these is part of it."""
    ignore_eos: bool = False
    """The model's own end of text ends nothing."""
    n: int = 1
    """Answers, each with chances of its own."""
    logprobs: int | None = None
    """Tell the logarithm of each token's probability, and of so many of the likeliest."""
    grammar: Grammar | None = None
    """All of an answer's text is to match it; it ends where nothing may follow."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens, from the second one on."""
    timeout: float | None = None
    """Seconds from now until the last token; None: as long as it takes."""
    tenant: str | None = None
    """With whom it shares its turns in the queue; default: the adapter's name."""


def checked(
    request: GenerationRequest, vocabulary: int, length: int, most_weight: float | None = None
) -> GenerationRequest:
    """The same in Python's own numbers.

    Args:
        length: of a row of the engine: a prompt and its answer have no more tokens.
        most_weight: of an adapter, where its graph takes weights of several; None: it does not.

    Raises:
        InputError: a value is not what it may be.
    """
    if request.tenant is not None and not isinstance(request.tenant, str):
        raise InputError(f"tenant is {quoted(request.tenant)}; expected a name, or None")
    if not isinstance(request.ignore_eos, bool | np.bool_):
        raise InputError(f"ignore_eos is {quoted(request.ignore_eos)}; expected True or False")
    if request.grammar is not None:
        if not isinstance(request.grammar, Grammar):
            raise InputError(f"grammar is {quoted(request.grammar)}; expected a Grammar, or None")
        request.grammar.check()
    tokens = read_tokens("tokens", request.tokens, vocabulary)
    if not tokens:
        raise InputError("tokens is empty; a prompt has one token at least")
    max_tokens = read_count("max_tokens", request.max_tokens, 1)
    if len(tokens) + max_tokens > length:
        raise InputError(
            f"a prompt of {len(tokens)} tokens and {max_tokens} new ones are more than the"
            f" {length} that this generator holds for each; shorten the prompt, or lower the number"
            " of new tokens"
        )
    top_p = _number("top_p", request.top_p, 0.0, 1.0)
    if top_p == 0:
        raise InputError("top_p is 0.0; expected a number above 0, up to 1")
    repetition = _number("repetition_penalty", request.repetition_penalty, 0.0, _LARGEST)
    if repetition == 0:
        raise InputError(
            "repetition_penalty is 0.0; expected a number above 0; 1 penalises nothing"
        )
    return replace(
        request,
        tokens=tokens,
        adapter=_read_adapter(request.adapter, most_weight),
        max_tokens=max_tokens,
        min_tokens=read_count("min_tokens", request.min_tokens, 0, max_tokens),
        temperature=_number("temperature", request.temperature, 0.0, _LARGEST),
        top_k=read_count("top_k", request.top_k, 0),
        top_p=top_p,
        min_p=_number("min_p", request.min_p, 0.0, 1.0),
        repetition_penalty=repetition,
        presence_penalty=_number("presence_penalty", request.presence_penalty),
        frequency_penalty=_number("frequency_penalty", request.frequency_penalty),
        logit_bias=_read_bias(request.logit_bias, vocabulary),
        suppress_tokens=read_tokens("suppress_tokens", request.suppress_tokens, vocabulary),
        no_repeat_ngram_size=read_count("no_repeat_ngram_size", request.no_repeat_ngram_size, 0),
        bad_words_ids=_read_words(request.bad_words_ids, vocabulary),
        seed=None if request.seed is None else read_count("seed", request.seed, 0),
        stop=read_stop(request.stop),
        stop_token_ids=read_tokens("stop_token_ids", request.stop_token_ids, vocabulary),
        ignore_eos=bool(request.ignore_eos),
        n=read_count("n", request.n, 1, MOST_ANSWERS),
        logprobs=_optional_count("logprobs", request.logprobs, min(MOST_LOGPROBS, vocabulary)),
        prompt_logprobs=_optional_count(
            "prompt_logprobs", request.prompt_logprobs, min(MOST_LOGPROBS, vocabulary)
        ),
        timeout=None if request.timeout is None else _number("timeout", request.timeout, 0.0),
    )


def _read_adapter(adapter: Any, most_weight: float | None) -> RowAdapters:
    if adapter is None or isinstance(adapter, str):
        return adapter
    if not isinstance(adapter, Mapping):
        raise InputError(f"adapter is {quoted(adapter)}; expected a name, weights by name, or None")
    if most_weight is None:
        raise InputError(
            "adapter is a blend, which this graph has no input for; add export: {blend: true} to"
            " the spec and build again"
        )
    for name, weight in adapter.items():
        if not isinstance(name, str) or not is_weight(weight):
            raise InputError(
                f"adapter: weight {quoted(weight)} of adapter {quoted(name)}; expected a finite"
                " number, as float32 holds it, for each name"
            )
        if abs(weight) > most_weight:
            raise InputError(
                f"adapter: weight {weight!r} of adapter {quoted(name)}; this graph's dtype holds"
                f" {most_weight:g} at most"
            )
    return {name: float(weight) for name, weight in adapter.items()}


def read_tokens(name: str, tokens: Any, vocabulary: int) -> list[int]:
    """Token ids as Python's numbers. Raises InputError: one is none, or not of the vocabulary."""
    if hasattr(tokens, "tolist") and not isinstance(tokens, list):
        tokens = tokens.tolist()  # numpy's and torch's
    if isinstance(tokens, str | bytes | Mapping) or not isinstance(tokens, Iterable):
        raise InputError(f"{name} is {quoted(tokens)}; expected a list of token ids")
    are_plain = isinstance(tokens, list) and {*map(type, tokens)} == {int}
    if are_plain and min(tokens) >= 0 and max(tokens) < vocabulary:  # as most are
        return [*tokens]
    ids = []
    for index, token in enumerate(tokens):
        number = _integer(token)
        if number is None or not 0 <= number < vocabulary:
            raise InputError(
                f"{name}[{index}] is {quoted(token)}; expected a token id, 0 to {vocabulary - 1}"
            )
        ids.append(number)
    return ids


def _integer(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def read_count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number in these limits. Raises InputError."""
    number = _integer(value)
    if number is None or number < least or (most is not None and number > most):
        limits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} is {quoted(value)}; expected a whole number {limits}")
    return number


def _optional_count(name: str, value: Any, most: int) -> int | None:
    return None if value is None else read_count(name, value, 0, most)


def _number(name: str, value: Any, least: float = -_LARGEST, most: float = _LARGEST) -> float:
    """A finite number; NaN is none. Raises InputError."""
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        limits = f"{least:g} to {most:g}"
        limits = {(-_LARGEST, _LARGEST): "any finite one", (0.0, _LARGEST): "0 or more"}.get(
            (least, most), limits
        )
        raise InputError(f"{name} is {quoted(value)}; expected a number, {limits}")
    return float(value)


def _read_bias(bias: Any, vocabulary: int) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias is {quoted(bias)}; expected numbers by token id")
    ids = read_tokens("logit_bias", list(bias), vocabulary)
    values = (_number(f"logit_bias[{token}]", value) for token, value in bias.items())
    return dict(zip(ids, values, strict=True))


def _read_words(words: Any, vocabulary: int) -> list[list[int]]:
    if hasattr(words, "tolist") and not isinstance(words, list):
        words = words.tolist()
    if isinstance(words, str | Mapping) or not isinstance(words, Iterable):
        raise InputError(f"bad_words_ids is {quoted(words)}; expected lists of token ids")
    read = [
        read_tokens(f"bad_words_ids[{index}]", word, vocabulary) for index, word in enumerate(words)
    ]
    if not all(read):
        raise InputError(f"bad_words_ids[{read.index([])}] is empty; a word has one token at least")
    return read


def read_stop(stop: Any) -> tuple[str, ...]:
    """The texts that end an answer. Raises InputError: it is no list of texts, or too long."""
    texts = () if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    are_texts = all(isinstance(text, str) and text for text in texts)
    if isinstance(stop, str) or not isinstance(stop, Iterable) or not are_texts:
        raise InputError(f"stop is {quoted(stop)}; expected a list of texts, none of them empty")
    if len(texts) > MOST_STOPS:
        raise InputError(f"stop has {len(texts)} texts; at most {MOST_STOPS} may end an answer")
    return texts
