"""Texts held to others: /v1/rerank as Jina's and Cohere's, /v1/score as vLLM's.

A cross-encoder reads each pair; of a model of vectors it is their cosine.
"""

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.routing import Route

from ..errors import invalid, unsupported
from ..hosts.encoder import EncoderHost, Row
from ..hosts.labels import cosines, fit_scores, label_output
from ..hosts.texts import Tokens
from ..hosts.vectors import vector_output
from ..service import Service
from .common import OfModel, Usage, check_count
from .encoding import counted, new_id, read_texts, run_rows, stack
from .endpoint import Call, Json, post

_PAIRS = "sequence-classification"


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """A document as Jina's and Cohere's clients may send it."""

    text: str


class RerankBody(OfModel, kw_only=True):
    """A query and documents -> the documents from the best one down."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    """So many of the best; absent or 0: all."""
    return_documents: bool = True
    truncate_prompt_tokens: int | None = None
    """Cut longer pairs to so many tokens, -1: to the model's own limit; absent: refuse them."""
    max_tokens_per_doc: int | None = None
    """Cut documents to so many tokens, whatever the query's are."""
    use_activation: bool | None = None
    """false: the score as the head gives it, not behind a sigmoid."""


class Ranked(msgspec.Struct, omit_defaults=True):
    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(msgspec.Struct):
    id: str
    model: str
    results: list[Ranked]
    usage: Usage


class ScoreBody(OfModel, kw_only=True):
    """Two texts, or lists of them -> how well they fit, pair by pair."""

    text_1: str | list[str]
    text_2: str | list[str]
    truncate_prompt_tokens: int | None = None
    use_activation: bool | None = None


class Score(msgspec.Struct):
    index: int
    score: float
    object: str = "score"


class Scores(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Score]
    usage: Usage
    object: str = "list"


def routes(service: Service) -> list[Route]:
    """One answer for all paths of each."""
    ranks = [
        post(service, path, RerankBody, Ranking, _rerank)
        for path in ("/v1/rerank", "/v2/rerank", "/rerank")
    ]
    scores = [post(service, path, ScoreBody, Scores, _score) for path in ("/v1/score", "/score")]
    return ranks + scores


async def _rerank(call: Call[RerankBody]) -> Response:
    """Documents by how well they fit a query."""
    body = call.body
    host, target = await call.resolve(EncoderHost, body.model, body.adapters)
    check_count(len(body.documents), call.service.settings.max_inputs, "documents")
    if body.top_n is not None and body.top_n < 0:
        raise invalid(f"top_n is {body.top_n}; expected 0 or more", "top_n")
    texts = [one if isinstance(one, str) else one.text for one in body.documents]
    pairs = [(body.query, text) for text in texts]
    scores, tokens = await _fit(call, host, pairs, body.max_tokens_per_doc)
    order = np.argsort(-scores, kind="stable")[: body.top_n or None]
    results = [
        Ranked(
            int(index),
            float(scores[index]),
            Document(texts[index]) if body.return_documents else None,
        )
        for index in order
    ]
    return Json(Ranking(new_id("rerank"), target.label, results, counted(call, tokens)))


async def _score(call: Call[ScoreBody]) -> Response:
    """How well each pair of texts fits."""
    body = call.body
    host, target = await call.resolve(EncoderHost, body.model, body.adapters)
    pairs = _pair(body.text_1, body.text_2)
    check_count(len(pairs), call.service.settings.max_inputs, "text_2")
    scores, tokens = await _fit(call, host, pairs, None)
    data = [Score(index, float(score)) for index, score in enumerate(scores)]
    said = counted(call, tokens)
    return Json(Scores(new_id("score"), int(time.time()), target.label, data, said))


def _pair(first: str | list[str], second: str | list[str]) -> list[tuple[str, str]]:
    """One for each of the second; one of the first goes with all. Raises ApiError (400)."""
    firsts = [first] if isinstance(first, str) else first
    seconds = [second] if isinstance(second, str) else second
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise invalid(
            f"text_1 has {len(firsts)} texts and text_2 {len(seconds)}; give one, or as many",
            "text_1",
        )
    return list(zip(firsts, seconds, strict=True))


async def _fit(
    call: Call[Any],
    host: EncoderHost,
    pairs: Sequence[tuple[str, str]],
    most_document: int | None,
) -> tuple[np.ndarray, list[Tokens]]:
    """The score of each pair, and the tokens that were computed for all."""
    body: RerankBody | ScoreBody = call.body
    if most_document is not None and most_document < 1:
        raise invalid("max_tokens_per_doc: expected 1 or more", "max_tokens_per_doc")
    truncate = body.truncate_prompt_tokens
    if host.model.task == _PAIRS:
        output = label_output(host, _PAIRS)
        tokens = await read_texts(
            call, host, pairs, truncate, "documents", most_second=most_document
        )
        values = stack(await run_rows(call, host, [Row(one) for one in tokens]), output)
        return fit_scores(host, values, body.use_activation), tokens
    output = vector_output(host)
    if body.use_activation is not None:
        raise unsupported("use_activation", "of a model of vectors the score is their cosine")
    if most_document is not None:
        raise unsupported("max_tokens_per_doc", "of a model of vectors pass truncate_prompt_tokens")
    every = list(dict.fromkeys(text for pair in pairs for text in pair))
    tokens = await read_texts(call, host, every, truncate, "documents")
    vectors = stack(await run_rows(call, host, [Row(one) for one in tokens]), output)
    place = {text: index for index, text in enumerate(every)}
    first, second = (vectors[[place[pair[side]] for pair in pairs]] for side in (0, 1))
    return cosines(first, second), tokens
