"""What is sent, drawn from a seed: whose request it is, its texts, and when it comes."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import msgspec

Route = Literal["embeddings", "completions"]
WORDS = (
    *("the", "of", "and", "to", "in", "is", "it", "that", "for", "on", "with", "as", "was", "at"),
    *("by", "file", "reads", "value", "returns", "number", "request", "model", "first", "other"),
)
"""Of which texts are made where no file has any."""


@dataclass(frozen=True)
class Load:
    """A load. Two of the same values are the same requests in the same order."""

    route: Route
    models: tuple[str, ...]
    """Of the requests, the most frequent first."""
    zipf: float = 0.0
    """The k-th model is asked in proportion to k ** -zipf."""
    texts: tuple[str, ...] = ()
    """From which they are drawn; none: of words, so many as `words` says."""
    words: tuple[int, int] = (4, 64)
    """The fewest and the most of a text; its logarithm is drawn evenly."""
    inputs: int = 1
    """Texts of a request for embeddings."""
    max_tokens: int = 32
    """Of a completion."""
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One of them."""

    model: int
    """Its place among the load's."""
    body: bytes


def requests(load: Load) -> Iterator[Request]:
    """Requests without end."""
    drawn = random.Random(load.seed)
    weights = list(accumulate((place + 1) ** -load.zipf for place in range(len(load.models))))
    places = range(len(load.models))
    encoder = msgspec.json.Encoder()
    while True:
        (model,) = drawn.choices(places, cum_weights=weights)
        texts = [_text(load, drawn) for _ in range(load.inputs)]
        yield Request(model, encoder.encode(_body(load, load.models[model], texts)))


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests come, `rate` a second: a Poisson process."""
    drawn, at = random.Random(f"arrivals {seed}"), 0.0
    while True:
        at += drawn.expovariate(rate)
        yield at


def _text(load: Load, drawn: random.Random) -> str:
    if load.texts:
        return drawn.choice(load.texts)
    low, high = load.words
    count = round(low * (high / low) ** drawn.random())
    return " ".join(drawn.choices(WORDS, k=count))


def _body(load: Load, model: str, texts: Sequence[str]) -> dict[str, object]:
    if load.route == "embeddings":
        return {"model": model, "input": texts, "encoding_format": "base64"}
    return {
        "model": model,
        "prompt": texts[0],
        "max_tokens": load.max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
