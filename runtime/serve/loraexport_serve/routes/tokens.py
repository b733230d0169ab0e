"""POST /tokenize and /detokenize, as vLLM's: what a model makes of a text, and back."""

from typing import Annotated, Any

import msgspec
from starlette.responses import Response
from starlette.routing import Route

from ..errors import invalid, unsupported
from ..hosts.decoder import DecoderHost
from ..hosts.host import Host
from ..hosts.texts import TextEncoder
from ..service import Service
from .common import Body, ModelName
from .endpoint import Call, Json, post
from .generation.messages import Message, Tool, template_messages, template_tools

_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class TokenizeBody(Body, kw_only=True):
    """A prompt, or the messages of a chat, -> token ids."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the chat template."""
    add_special_tokens: bool | None = None
    """With those around a text; default: of a prompt they are, a chat's template has its own."""
    add_generation_prompt: bool = True
    """With the beginning of the answer."""
    return_token_strs: bool = False
    user: str | None = None


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Body, kw_only=True):
    """Token ids -> their text, special tokens too."""

    tokens: list[_Token]
    model: ModelName | None = None
    user: str | None = None


class Detokenized(msgspec.Struct):
    prompt: str


def routes(service: Service) -> list[Route]:
    """/tokenize and /detokenize."""
    return [
        post(service, "/tokenize", TokenizeBody, Tokenized, _tokenize),
        post(service, "/detokenize", DetokenizeBody, Detokenized, _detokenize),
    ]


async def _tokenize(call: Call[TokenizeBody]) -> Response:
    """The token ids of a text or of a chat."""
    body = call.body
    host, _ = await call.resolve(Host, body.model)
    encoder = _require(host)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give either prompt or messages", "prompt")
    if body.prompt is not None:
        if body.tools is not None or body.chat_template_kwargs is not None:
            raise invalid("tools and chat_template_kwargs go with messages", "prompt")
        prompt, special = body.prompt, body.add_special_tokens is not False
        ids = await call.service.read_texts(
            len(prompt), lambda: encoder.ids(prompt, special=special)
        )
    else:
        ids = await _encode_chat(call, host, encoder)
    pieces = encoder.pieces(ids) if body.return_token_strs else None
    return Json(Tokenized(len(ids), host.max_model_len, ids, pieces))


async def _encode_chat(call: Call[TokenizeBody], host: Host, encoder: TextEncoder) -> list[int]:
    body = call.body
    if not isinstance(host, DecoderHost):
        raise unsupported("messages", f"`{host.name}` is an encoder, which has no chats")
    arguments = dict(body.chat_template_kwargs or {})
    arguments["add_generation_prompt"] = body.add_generation_prompt
    messages, tokenizer = template_messages(body.messages or []), host.tokenizer
    tools = template_tools(body.tools) if body.tools else None
    special = body.add_special_tokens is True

    def encode() -> list[int]:
        text = tokenizer.render_chat(messages, tools, **arguments)
        return encoder.ids(text, special=special)

    # A template runs in a process that is waited for.
    return await call.service.beside(encode)


async def _detokenize(call: Call[DetokenizeBody]) -> Response:
    """The text of token ids."""
    host, _ = await call.resolve(Host, call.body.model)
    encoder, ids = _require(host), call.body.tokens
    if ids and max(ids) >= encoder.vocabulary:
        raise invalid(f"tokens: {max(ids)}; expected 0 to {encoder.vocabulary - 1}", "tokens")
    text = await call.service.read_texts(4 * len(ids), lambda: encoder.decode(ids))
    return Json(Detokenized(text))


def _require(host: Host) -> TextEncoder:
    if host.texts is None:
        raise invalid(f"`{host.name}` has no tokenizer", "model")
    return host.texts
