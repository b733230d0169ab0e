"""What chats and completions say alike: usage, and probabilities of tokens."""

from collections.abc import Iterable

import msgspec

from loraexport_runtime import GeneratedToken

from ...hosts.texts import TextEncoder
from .run import Run

_LEAST = -9999.0
"""In place of minus infinity, which JSON lacks; as vLLM has it."""


class PromptDetails(msgspec.Struct):
    cached_tokens: int
    """Of the prompts, those that were not read again."""


class GeneratedUsage(msgspec.Struct):
    """Tokens that were computed; those that ended an answer do not count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Likely(msgspec.Struct):
    """A token's text, and the logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int] | None
    """Of its text; null of a token that is a part of a character."""


class TokenLogprob(Likely):
    top_logprobs: list[Likely]
    """The likeliest tokens at its place."""


def usage_of(run: Run) -> GeneratedUsage:
    """Of a run that has ended."""
    prompt, completion = run.prompt_tokens, run.completion_tokens
    details = PromptDetails(run.cached_tokens)
    return GeneratedUsage(prompt, completion, prompt + completion, details)


def token_logprobs(encoder: TextEncoder, tokens: Iterable[GeneratedToken]) -> list[TokenLogprob]:
    """As chats tell them."""
    told = []
    for token in tokens:
        likely = _likely(encoder, token.token, token.logprob)
        top = [_likely(encoder, other, value) for other, value in token.likeliest]
        told.append(TokenLogprob(likely.token, likely.logprob, likely.bytes, top))
    return told


def finite(logprob: float | None) -> float:
    return _LEAST if logprob is None else max(logprob, _LEAST)


def _likely(encoder: TextEncoder, token: int, logprob: float | None) -> Likely:
    text = encoder.text_of(token)
    is_whole = "\ufffd" not in text
    return Likely(text, finite(logprob), list(text.encode()) if is_whole else None)
