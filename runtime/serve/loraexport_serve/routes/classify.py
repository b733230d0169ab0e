"""Labels of texts and of their tokens: /classify as vLLM's, and its /pooling of any encoder."""

import time
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.routing import Route

from ..errors import invalid
from ..hosts.encoder import EncoderHost, Row
from ..hosts.labels import best, label_names, label_output, probabilities
from ..hosts.texts import Tokens
from ..hosts.vectors import vector_output
from ..service import Service
from .common import OfModel, Usage, check_count
from .encoding import counted, new_id, read_texts, run_rows
from .endpoint import Call, Json, post

_OF_TEXTS, _OF_TOKENS = "sequence-classification", "token-classification"


class TextsBody(OfModel, kw_only=True):
    """Texts for a classifier, or for any encoder."""

    input: str | Annotated[list[str], msgspec.Meta(min_length=1)]
    truncate_prompt_tokens: int | None = None
    """Cut longer texts to so many tokens, -1: to the model's own limit; absent: refuse them."""
    use_activation: bool | None = None
    """false: what the head gives, and no probabilities."""


class PoolingBody(TextsBody, kw_only=True):
    """The same, and what is to be given."""

    task: Literal["embed", "classify", "token_classify", "token_embed"] | None = None
    """Absent: what the model gives."""
    encoding_format: Literal["float"] = "float"


class TokenLabel(msgspec.Struct):
    token: str
    start: int
    """Of the text's characters; of a token that the model has put there, both are 0."""
    end: int
    label: str
    probs: list[float]


class Classified(msgspec.Struct, omit_defaults=True):
    """The label of a text, or those of its tokens."""

    index: int
    num_classes: int
    label: str | None = None
    probs: list[float] | None = None
    tokens: list[TokenLabel] | None = None


class Classes(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Classified]
    usage: Usage
    object: str = "list"


class Pooled(msgspec.Struct):
    index: int
    data: list[Any]
    object: str = "pooling"


class Pools(msgspec.Struct):
    id: str
    created: int
    model: str
    data: list[Pooled]
    usage: Usage
    object: str = "list"


def routes(service: Service) -> list[Route]:
    """/classify, /v1/classify and /pooling."""
    paths = ("/classify", "/v1/classify")
    classes = [post(service, path, TextsBody, Classes, _classify) for path in paths]
    return [*classes, post(service, "/pooling", PoolingBody, Pools, _pool)]


async def _classify(call: Call[TextsBody]) -> Response:
    """The label of each text, or of each of its tokens."""
    body = call.body
    host, target = await call.resolve(EncoderHost, body.model, body.adapters)
    task = _OF_TOKENS if host.model.task == _OF_TOKENS else _OF_TEXTS
    output = label_output(host, task)
    tokens, outputs = await _run(call, host)
    data = []
    for index, (one, values) in enumerate(zip(tokens, outputs, strict=True)):
        probs = probabilities(host, values[output], body.use_activation)
        names = label_names(host, probs.shape[-1])
        if task == _OF_TEXTS:
            data.append(Classified(index, len(names), best(probs, names), probs.tolist()))
            continue
        pieces = zip(host.require_texts().pieces(one.ids), one.spans, probs, strict=True)
        parts = [
            TokenLabel(piece, *span, best(row, names), row.tolist()) for piece, span, row in pieces
        ]
        data.append(Classified(index, len(names), tokens=parts))
    said = counted(call, tokens)
    return Json(Classes(new_id("classify"), int(time.time()), target.label, data, said))


async def _pool(call: Call[PoolingBody]) -> Response:
    """What an encoder gives for each text: a vector, probabilities, or those of each token."""
    body = call.body
    host, target = await call.resolve(EncoderHost, body.model, body.adapters)
    task = _task(host)
    if body.task is not None and body.task != task:
        raise invalid(f"`{host.name}` gives {task}, not {body.task}", "task")
    if body.use_activation is not None and not task.endswith("classify"):
        raise invalid("use_activation is of classifiers alone", "use_activation")
    output = vector_output(host) if task == "embed" else host.model.outputs[0].name
    tokens, outputs = await _run(call, host)
    data = []
    for index, values in enumerate(outputs):
        y = values[output].astype(np.float32)
        if task.endswith("classify"):
            y = probabilities(host, y, body.use_activation)
        data.append(Pooled(index, y.tolist()))
    said = counted(call, tokens)
    return Json(Pools(new_id("pool"), int(time.time()), target.label, data, said))


async def _run(
    call: Call[Any], host: EncoderHost
) -> tuple[list[Tokens], list[dict[str, np.ndarray]]]:
    """The tokens of the body's texts, and the outputs of each."""
    body: TextsBody = call.body
    texts = [body.input] if isinstance(body.input, str) else body.input
    check_count(len(texts), call.service.settings.max_inputs, "input")
    tokens = await read_texts(call, host, texts, body.truncate_prompt_tokens, "input")
    return tokens, await run_rows(call, host, [Row(one) for one in tokens])


def _task(host: EncoderHost) -> str:
    """vLLM's name for what an encoder gives. Raises ApiError (400)."""
    match host.model.task:
        case "sequence-classification":
            return "classify"
        case "token-classification":
            return "token_classify"
        case "feature-extraction":
            return "token_embed"
        case _:
            vector_output(host)
            return "embed"
