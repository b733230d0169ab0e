"""POST /v1/chat/completions, as OpenAI's and vLLM's."""

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.responses import Response
from starlette.routing import Route

from loraexport_runtime import Grammar

from ...errors import invalid, unsupported
from ...hosts.catalog import Target
from ...hosts.decoder import DecoderHost
from ...hosts.texts import TextEncoder
from ...service import Service
from ..encoding import new_id
from ..endpoint import Call, Json, post
from .answers import GeneratedUsage, TokenLogprob, token_logprobs, usage_of
from .body import MOST_LOGPROBS, Count, GenerationBody, find_limit, make_requests, resolve
from .calls import Called, CallReader, call_grammar
from .events import Events
from .messages import Message, Tool, ToolChoice, template_messages, template_tools
from .run import News, Run, start

Reason = Literal["stop", "length", "tool_calls"]


class ChatBody(GenerationBody, kw_only=True):
    """A chat -> what comes next in it."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    """The newer name of `max_tokens`; absent: as many as there is room for."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    """none: the model is told of no tool. required: the answer is calls; of a named function: it is
    one call of that. Then arguments match their schemas."""
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    """For the chat template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of it."""
    add_generation_prompt: bool | None = None
    """With the beginning of the answer; it is, unless this is false."""


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]


class ChatMessage(msgspec.Struct, omit_defaults=True):
    content: str | None
    tool_calls: list[Called] | UnsetType = UNSET
    role: str | UnsetType = UNSET


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Reason


class Chat(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: GeneratedUsage
    object: str = "chat.completion"


class Delta(msgspec.Struct):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    tool_calls: list[Called] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None


class Chunk(msgspec.Struct):
    """One event of a stream."""

    id: str
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: GeneratedUsage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


def routes(service: Service) -> list[Route]:
    """/v1/chat/completions."""
    return [post(service, "/v1/chat/completions", ChatBody, Chat, _chat)]


async def _chat(call: Call[ChatBody]) -> Response:
    """What comes next in a chat, whole, or as server-sent events (`stream`)."""
    body = call.body
    host, target = await resolve(call)
    logprobs = _read_logprobs(body)
    tools, calls = _read_tools(body)
    prompt = await _encode(call, host, tools)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("max_tokens is max_completion_tokens; give one", "max_tokens")
    asked = body.max_tokens or body.max_completion_tokens
    limit = find_limit(host, prompt, asked, None, "messages")
    requests = make_requests(call, host, [prompt], [limit], logprobs, calls)
    run = await start(call, host, requests)
    answer = _Answer(call, host, target, run, tools is not None)
    return Events(call, answer.chunks()) if body.stream else Json(await answer.whole())


def _read_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs goes with logprobs", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _read_tools(body: ChatBody) -> tuple[list[dict[str, Any]] | None, Grammar | None]:
    """What the model is told of tools, and what its text has to be, if it is to call one.

    Raises:
        ApiError: 400.
    """
    choice = body.tool_choice
    is_forced = choice not in (None, "none", "auto")
    if body.parallel_tool_calls is False and not is_forced:
        why = "the model decides how many, but where tool_choice forces a call"
        raise unsupported("parallel_tool_calls", why)
    if not body.tools:
        if choice not in (None, "none") or body.parallel_tool_calls:
            param = "parallel_tool_calls" if choice in (None, "none") else "tool_choice"
            raise invalid(f"{param} goes with tools", param)
        return None, None
    tools = template_tools(body.tools, is_forced)
    if not is_forced:
        return None if choice == "none" else tools, None
    functions = [tool.function for tool in body.tools]
    are_many = body.parallel_tool_calls is not False
    if isinstance(choice, ToolChoice):
        functions = [one for one in functions if one.name == choice.function.name]
        are_many = False
        if not functions:
            raise invalid("tool_choice names none of the tools", "tool_choice")
    return tools, call_grammar(functions, are_many)


async def _encode(
    call: Call[ChatBody], host: DecoderHost, tools: list[dict[str, Any]] | None
) -> list[int]:
    """The tokens of the chat, by the model's template. Raises ApiError, BatchError."""
    body, tokenizer = call.body, host.tokenizer
    if not tokenizer.has_chat_template:
        raise invalid(f"`{host.name}` has no chat template; ask /v1/completions", "model")
    messages = template_messages(body.messages)
    arguments = dict(body.chat_template_kwargs or {})
    for name in ("messages", "tools", "documents", "chat_template", "add_generation_prompt"):
        if name in arguments:
            raise invalid(f"chat_template_kwargs: {name} is no variable of its own", name)
    arguments["add_generation_prompt"] = body.add_generation_prompt is not False
    # A template runs in a process that is waited for.
    return await call.service.beside(
        lambda: tokenizer.encode_chat(messages, tools, body.documents, **arguments)
    )


class _Answer:
    """A run in OpenAI's shapes."""

    def __init__(
        self, call: Call[ChatBody], host: DecoderHost, target: Target, run: Run, has_tools: bool
    ) -> None:
        self._body, self._run, self._model = call.body, run, target.label
        self._id, self._created = new_id("chatcmpl"), int(time.time())
        assert host.texts is not None, "a decoder has a tokenizer"
        self._encoder: TextEncoder = host.texts
        self._readers = [CallReader() for _ in range(run.num_answers if has_tools else 0)]

    async def whole(self) -> Chat:
        """All of it at once."""
        num = self._run.num_answers
        texts, calls = [""] * num, [list[Called]() for _ in range(num)]
        logprobs = [list[TokenLogprob]() for _ in range(num)]
        reasons: list[Reason] = ["stop"] * num
        async for fresh in self._run.news():
            for news in fresh:
                content, called, reason = self._read(news)
                texts[news.choice] += content
                calls[news.choice] += [msgspec.structs.replace(one, index=UNSET) for one in called]
                if self._body.logprobs:
                    logprobs[news.choice] += token_logprobs(self._encoder, news.tokens)
                reasons[news.choice] = reason or "stop"
        choices = [
            ChatChoice(
                index,
                ChatMessage(
                    texts[index] or (None if calls[index] else ""),
                    calls[index] or UNSET,
                    "assistant",
                ),
                ChatLogprobs(logprobs[index]) if self._body.logprobs else None,
                reasons[index],
            )
            for index in range(num)
        ]
        return Chat(self._id, self._created, self._model, choices, usage_of(self._run))

    async def chunks(self) -> AsyncGenerator[list[Chunk], None]:
        """Its events, those that come together."""
        num = self._run.num_answers
        yield [self._chunk(ChunkChoice(at, Delta("assistant", ""))) for at in range(num)]
        async for fresh in self._run.news():
            yield [chunk for news in fresh for chunk in self._events(news)]
        if self._tells_usage:
            chunk = self._chunk()
            chunk.usage = usage_of(self._run)
            yield [chunk]

    @property
    def _tells_usage(self) -> bool:
        options = self._body.stream_options
        return options is not None and bool(options.include_usage)

    def _events(self, news: News) -> list[Chunk]:
        content, calls, reason = self._read(news)
        logprobs = None
        if self._body.logprobs and news.tokens:
            logprobs = ChatLogprobs(token_logprobs(self._encoder, news.tokens))
        chunks = []
        if content or logprobs is not None:
            delta = Delta(content=content)
            chunks.append(self._chunk(ChunkChoice(news.choice, delta, logprobs)))
        if calls:
            chunks.append(self._chunk(ChunkChoice(news.choice, Delta(tool_calls=calls))))
        if reason is not None:
            chunks.append(self._chunk(ChunkChoice(news.choice, Delta(), None, reason)))
        return chunks

    def _read(self, news: News) -> tuple[str, list[Called], Reason | None]:
        """The content, the calls, and why it has ended."""
        if not self._readers:
            return news.text, [], news.reason
        reader = self._readers[news.choice]
        content, calls = reader.push(news.text)
        if news.reason is None:
            return content, calls, None
        rest, last = reader.finish()
        reason: Reason = news.reason
        if reader.num_calls and reason == "stop":
            reason = "tool_calls"
        return content + rest, [*calls, *last], reason

    def _chunk(self, *choices: ChunkChoice) -> Chunk:
        chunk = Chunk(self._id, self._created, self._model, list(choices))
        if self._tells_usage:
            chunk.usage = None
        return chunk
