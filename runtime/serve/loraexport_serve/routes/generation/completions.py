"""POST /v1/completions, as OpenAI's and vLLM's."""

import time
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response
from starlette.routing import Route

from ...errors import invalid, unsupported
from ...hosts.catalog import Target
from ...hosts.decoder import DecoderHost
from ...hosts.texts import TextEncoder
from ...service import Service
from ..common import check_count
from ..encoding import new_id
from ..endpoint import Call, Json, post
from .answers import GeneratedUsage, finite, usage_of
from .body import MOST_LOGPROBS, GenerationBody, find_limit, make_requests, resolve
from .events import Events
from .run import News, Reason, Run, start

_USUAL = 16
"""Tokens of an answer that names no number, as OpenAI has it."""


class CompletionBody(GenerationBody, kw_only=True):
    """Texts or token ids -> what comes next."""

    prompt: str | list[str | int | list[int]]
    """A text, texts, the token ids of one text, or those of several."""
    logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    """Of each token, and of so many of the likeliest."""
    add_special_tokens: bool | None = None
    """With those that begin a text; they are, unless this is false."""
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


class CompletionLogprobs(msgspec.Struct):
    """By token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Where each begins in the answer's tokens, joined."""

    def extend(self, more: "CompletionLogprobs") -> None:
        """Add those of the tokens that follow."""
        self.tokens += more.tokens
        self.token_logprobs += more.token_logprobs
        self.top_logprobs += more.top_logprobs
        self.text_offset += more.text_offset


class CompletionChoice(msgspec.Struct):
    index: int
    """The answers to the first prompt are the first ones."""
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Reason | None
    """null of an event that is not an answer's last one."""


class Completions(msgspec.Struct):
    """An answer, or one event of a stream, which has no usage but in one of its own."""

    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: GeneratedUsage | UnsetType | None = UNSET
    object: str = "text_completion"


def routes(service: Service) -> list[Route]:
    """/v1/completions."""
    return [post(service, "/v1/completions", CompletionBody, Completions, _complete)]


async def _complete(call: Call[CompletionBody]) -> Response:
    """What comes next after each text, whole, or as server-sent events (`stream`)."""
    body = call.body
    host, target = await resolve(call)
    _check(body)
    prompts = await _encode(call, host)
    check_count(len(prompts) * (body.n or 1), call.service.settings.max_inputs, "prompt")
    limits = [find_limit(host, prompt, body.max_tokens, _USUAL, "prompt") for prompt in prompts]
    run = await start(call, host, make_requests(call, host, prompts, limits, body.logprobs))
    answer = _Answer(call, host, target, run)
    return Events(call, answer.chunks()) if body.stream else Json(await answer.whole())


def _check(body: CompletionBody) -> None:
    """Raise ApiError (400) for what would be ignored otherwise."""
    if body.echo:
        raise unsupported("echo", "the prompt is not given back")
    if body.suffix:
        raise unsupported("suffix", "nothing is put between two texts")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise unsupported("best_of", "all answers are given; it is n, or absent")


async def _encode(call: Call[CompletionBody], host: DecoderHost) -> list[list[int]]:
    """The tokens of each prompt. Raises ApiError (400, 413), BatchError."""
    body, tokenizer = call.body, host.tokenizer
    given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    most = call.service.settings.max_inputs
    texts = [one for one in given if isinstance(one, str)]
    numbers = [one for one in given if isinstance(one, int)]
    lists = [one for one in given if isinstance(one, list)]
    if max(len(texts), len(numbers), len(lists)) < len(given):
        raise invalid("prompt mixes texts and token ids; give one kind", "prompt")
    if not texts:
        if body.add_special_tokens is not None:
            raise unsupported("add_special_tokens", "token ids are taken as they are")
        prompts = [numbers] if numbers else lists
        check_count(len(prompts), most, "prompt")
        return prompts
    check_count(len(texts), most, "prompt")
    special = body.add_special_tokens is not False
    return await call.service.read_texts(
        sum(map(len, texts)), lambda: [tokenizer.encode(text, special) for text in texts]
    )


class _Answer:
    """A run in OpenAI's shapes."""

    def __init__(
        self, call: Call[CompletionBody], host: DecoderHost, target: Target, run: Run
    ) -> None:
        self._body, self._run, self._model = call.body, run, target.label
        self._id, self._created = new_id("cmpl"), int(time.time())
        assert host.texts is not None, "a decoder has a tokenizer"
        self._encoder: TextEncoder = host.texts
        self._offsets = [0] * run.num_answers

    async def whole(self) -> Completions:
        """All of it at once."""
        has_logprobs = self._body.logprobs is not None

        def empty() -> CompletionLogprobs | None:
            return CompletionLogprobs([], [], [], []) if has_logprobs else None

        choices = [
            CompletionChoice(index, "", empty(), None) for index in range(self._run.num_answers)
        ]
        async for fresh in self._run.news():
            for news in fresh:
                part, whole = self._choice(news), choices[news.choice]
                whole.text += part.text
                whole.finish_reason = part.finish_reason
                if part.logprobs is not None:
                    assert whole.logprobs is not None, "they were asked for"
                    whole.logprobs.extend(part.logprobs)
        return Completions(self._id, self._created, self._model, choices, usage_of(self._run))

    async def chunks(self) -> AsyncGenerator[list[Completions], None]:
        """Its events, those that come together."""
        options = self._body.stream_options
        tells = options is not None and bool(options.include_usage)
        usage = None if tells else UNSET
        async for fresh in self._run.news():
            choices = [self._choice(news) for news in fresh]
            yield [
                Completions(self._id, self._created, self._model, [one], usage)
                for one in choices
                if one.text or one.finish_reason or one.logprobs is not None
            ]
        if tells:
            yield [Completions(self._id, self._created, self._model, [], usage_of(self._run))]

    def _choice(self, news: News) -> CompletionChoice:
        logprobs = None
        if self._body.logprobs is not None and news.tokens:
            logprobs = self._logprobs(news)
        return CompletionChoice(news.choice, news.text, logprobs, news.reason)

    def _logprobs(self, news: News) -> CompletionLogprobs:
        told = CompletionLogprobs([], [], [], [])
        for token in news.tokens:
            text = self._encoder.text_of(token.token)
            told.tokens.append(text)
            told.token_logprobs.append(finite(token.logprob))
            likely: dict[str, float] = {}
            for other, value in token.likeliest:
                # Of two that read alike, the likelier one.
                likely.setdefault(self._encoder.text_of(other), finite(value))
            told.top_logprobs.append(likely)
            told.text_offset.append(self._offsets[news.choice])
            self._offsets[news.choice] += len(text)
        return told
