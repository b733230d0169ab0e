"""What the bodies of several routes share."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from ..errors import ApiError, invalid
from ..hosts.texts import TextEncoder

ModelName = Annotated[str, Meta(min_length=1, max_length=512)]
Weights = dict[ModelName, float]


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A request's body: strict types, and an unknown key is an error."""


class OfModel(Body, kw_only=True):
    """What every body that a model answers has."""

    model: ModelName | None = None
    """An adapter, `artifact:adapter`, or an artifact for its base."""
    adapters: Weights | None = None
    """A blend, weights by adapter; then `model` is an artifact."""
    user: str | None = None
    """Of no effect; OpenAI's clients send it."""


class Usage(msgspec.Struct):
    """Tokens that were computed."""

    prompt_tokens: int
    total_tokens: int


def usage(lengths: Sequence[int]) -> Usage:
    total = sum(lengths)
    return Usage(total, total)


def check_count(count: int, most: int, param: str) -> None:
    """Raise ApiError: 400 for none, 413 for more than the server takes."""
    if count == 0:
        raise invalid(f"{param} is empty; give one at least", param)
    if count > most:
        message = f"{param} has {count} items, and this server takes {most} at most"
        raise ApiError(413, message, code="batch_too_large", param=param)


def read_cut(truncate: int | None, texts: TextEncoder) -> int | None:
    """Tokens to cut longer texts to, of `truncate_prompt_tokens`: -1 is the model's own limit.

    Raises:
        ApiError: 400: it is another negative number, 0, or more than the model takes.
    """
    if truncate is None:
        return None
    param, limit = "truncate_prompt_tokens", texts.limit
    if truncate == -1:
        return limit
    if truncate < 1:
        raise invalid(f"{param} is {truncate}; expected -1, or a number from 1 on", param)
    if limit is not None and truncate > limit:
        raise invalid(f"{param} is {truncate}, and the model takes {limit} tokens", param)
    return truncate
