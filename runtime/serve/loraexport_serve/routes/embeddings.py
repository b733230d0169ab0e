"""POST /v1/embeddings, as OpenAI's; with vLLM's truncate_prompt_tokens, and the model's prompts."""

import base64
from typing import Literal

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.routing import Route

from ..errors import invalid, unsupported
from ..hosts.encoder import EncoderHost, Row
from ..hosts.texts import TextEncoder
from ..hosts.vectors import choose_prompt, read_rows, rows_of_ids, shorten, vector_output, width
from ..service import Service
from .common import OfModel, Usage, check_count, read_cut
from .encoding import counted, require_room, run_rows, stack
from .endpoint import Call, Json, post


class EmbeddingBody(OfModel, kw_only=True):
    """Texts or token ids -> a vector of each."""

    input: str | list[str | int | list[int]]
    """A text, texts, the token ids of one text, or those of several."""
    encoding_format: Literal["float", "base64"] = "float"
    """base64: little-endian float32."""
    dimensions: int | None = None
    """Of a model that was trained for it: the vector is cut, and of length 1 again."""
    truncate_prompt_tokens: int | None = None
    """Cut longer texts to so many tokens, -1: to the model's own limit; absent: refuse them."""
    add_special_tokens: bool = True
    """With those that the model has around a text; token ids are taken as they are."""
    prompt_name: str | None = None
    """Which of the model's own prompts stands ahead of each text."""
    input_type: str | None = None
    """The same by what a text is: query, document, passage, search_query, search_document."""


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class Embeddings(msgspec.Struct):
    data: list[Embedding]
    model: str
    usage: Usage
    object: str = "list"


def routes(service: Service) -> list[Route]:
    """/v1/embeddings."""
    return [post(service, "/v1/embeddings", EmbeddingBody, Embeddings, _embed)]


async def _embed(call: Call[EmbeddingBody]) -> Response:
    """A vector for each text."""
    body = call.body
    host, target = await call.resolve(EncoderHost, body.model, body.adapters)
    output = vector_output(host)
    size = _read_size(body, host, output)
    require_room(call, host)
    rows = await _read(call, host)
    vectors = stack(await run_rows(call, host, rows), output)
    if size is not None:
        vectors = shorten(vectors, size)
    encode = _base64 if body.encoding_format == "base64" else _floats
    data = [Embedding(index, encode(vector)) for index, vector in enumerate(vectors)]
    return Json(Embeddings(data, target.label, counted(call, [row.tokens for row in rows])))


def _read_size(body: EmbeddingBody, host: EncoderHost, output: str) -> int | None:
    """To how many numbers vectors are cut; None: not at all. Raises ApiError (400)."""
    size, whole = body.dimensions, width(host.model, output)
    if size is None or size == whole:
        return None
    if size not in host.settings.dimensions:
        known = ", ".join(map(str, [*host.settings.dimensions, whole]))
        raise unsupported("dimensions", f"{size} is none of this model's, which are {known}")
    return size


async def _read(call: Call[EmbeddingBody], host: EncoderHost) -> list[Row]:
    body, facts = call.body, host.model.facts
    given: list[str | int | list[int]] = [body.input] if isinstance(body.input, str) else body.input
    most = call.service.settings.max_inputs
    if isinstance(given[0] if given else None, str):
        texts = [text for text in given if isinstance(text, str)]
        check_count(len(texts), most, "input")
        if len(texts) < len(given):
            raise _mixed()
        encoder = host.require_texts()
        cut = read_cut(body.truncate_prompt_tokens, encoder)
        prompt = choose_prompt(
            facts.prompts, facts.default_prompt_name, body.prompt_name, body.input_type
        )
        characters = sum(map(len, texts))
        special = body.add_special_tokens

        def read(encoder: TextEncoder = encoder) -> list[Row]:
            return read_rows(encoder, texts, prompt, cut, special)

        return await call.service.read_texts(characters, read)
    if body.prompt_name is not None or body.input_type is not None:
        param = "prompt_name" if body.prompt_name is not None else "input_type"
        raise unsupported(param, "token ids are taken as they are; give texts")
    ids = _read_ids(given)
    check_count(len(ids), most, "input")
    encoder = host.require_texts()
    cut = read_cut(body.truncate_prompt_tokens, encoder)
    vocabulary = facts.vocab_size or encoder.vocabulary
    return rows_of_ids(ids, cut, vocabulary, host.max_model_len)


def _read_ids(given: list[str | int | list[int]]) -> list[list[int]]:
    """Token ids of one text, or of several."""
    numbers = [one for one in given if isinstance(one, int)]
    if numbers and len(numbers) == len(given):
        return [numbers]
    lists = [one for one in given if isinstance(one, list)]
    if len(lists) < len(given):
        raise _mixed()
    return lists


def _mixed() -> Exception:
    return invalid("input mixes texts and token ids; give one kind", "input")


def _floats(vector: np.ndarray) -> list[float]:
    values: list[float] = vector.tolist()
    return values


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4", copy=False).tobytes()).decode("ascii")
