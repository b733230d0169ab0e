"""What completions and chats have in common: how tokens are chosen, and when an answer ends."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import Meta

from loraexport_runtime import GenerationRequest, Grammar, InputError
from loraexport_runtime.generation.options import Options

from ...errors import ApiError, invalid
from ...hosts.catalog import Target
from ...hosts.decoder import DecoderHost
from ..common import Body
from ..endpoint import Call
from .grammars import GrammarBody, read_grammar

MOST_ANSWERS, MOST_LOGPROBS = 128, 20
_SEEDS = 2**64
Count = Annotated[int, Meta(ge=1, lt=2**31)]
Token = Annotated[int, Meta(ge=0, lt=2**31)]
_Penalty = Annotated[float, Meta(ge=-2, le=2)]
_Share = Annotated[float, Meta(ge=0, le=1)]
_FIELD = re.compile(r"[a-z_]+")


class StreamOptions(Body, kw_only=True):
    include_usage: bool | None = None
    """One more event, without choices, ahead of `[DONE]`."""


class GenerationBody(GrammarBody, kw_only=True):
    """What is absent or null is as the model's generation_config.json has it."""

    stream: bool | None = None
    """Server-sent events, as the text comes."""
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_ANSWERS)] | None = None
    """Answers to each prompt."""
    max_tokens: Count | None = None
    """Of an answer."""
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    """Nothing ends an answer that is shorter."""
    temperature: Annotated[float, Meta(ge=0)] | None = None
    """0 takes the likeliest token always."""
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    """Of so many of the likeliest tokens; 0 and -1: of all."""
    min_p: _Share | None = None
    """Of those that have this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: dict[Token, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    """Added to the logits of tokens."""
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    """An answer ends ahead of one of these."""
    stop_token_ids: list[Token] | None = None
    """Tokens that end an answer beside the model's own; none of these is part of it."""
    ignore_eos: bool | None = None
    """The model's own end of text ends nothing."""


async def resolve(call: Call[Any]) -> tuple[DecoderHost, Target]:
    """Whom the request means. Raises ApiError (404, 400)."""
    body: GenerationBody = call.body
    host, target = await call.resolve(DecoderHost, body.model, body.adapters)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options goes with stream", "stream_options")
    return host, target


def make_requests(
    call: Call[Any],
    host: DecoderHost,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    logprobs: int | None,
    calls: Grammar | None = None,
) -> list[GenerationRequest]:
    """What each prompt asks of the engine.

    Args:
        limits: new tokens at most, by prompt.
        logprobs: the likeliest tokens that are told with each; None: nothing is.
        calls: what an answer has to be that is to call tools.

    Raises:
        ApiError: 400.
    """
    body: GenerationBody = call.body
    assert call.target is not None, "the host was resolved"
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    named = read_grammar(body)
    if named is not None and calls is not None:
        raise invalid(f"{named[0]} and a forced tool_choice exclude each other", named[0])
    requests = []
    for row, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        options = Options(
            max_new_tokens=limit,
            temperature=body.temperature,
            top_k=None if body.top_k is None else max(body.top_k, 0),
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            min_new_tokens=body.min_tokens,
            # Prompts of one request draw tokens of their own.
            seed=None if body.seed is None else body.seed % _SEEDS + row * _SEEDS,
            stop=stop,
        )
        (chosen,) = options.requests([prompt], host.generator.defaults, host.engine.length)
        requests.append(
            GenerationRequest(
                tokens=prompt,
                adapter=call.target.adapter,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                logit_bias=body.logit_bias,
                stop_token_ids=tuple(body.stop_token_ids or ()),
                ignore_eos=bool(body.ignore_eos),
                n=body.n or 1,
                logprobs=logprobs,
                grammar=calls if named is None else named[1],
                tenant=call.caller.tenant,
                **chosen,
            )
        )
    return requests


def find_limit(
    host: DecoderHost, prompt: Sequence[int], asked: int | None, usual: int | None, param: str
) -> int:
    """How many tokens may follow a prompt.

    Args:
        asked: by the request.
        usual: where it asks for none; None: as the model says, or as many as there is room for.
        param: of the prompt.

    Raises:
        ApiError: 400: there is no room for them.
    """
    length, size = host.engine.length, len(prompt)
    if size == 0:
        raise invalid(f"{param} has no tokens; give one at least", param)
    room = length - size
    if asked is not None and asked > room and room > 0:
        raise _too_long(length, f"{size} of the prompt and {asked} of its answer", "max_tokens")
    if room < 1:
        raise _too_long(length, f"{size} of the prompt alone", param)
    if asked is not None:
        return asked
    defaults = host.generator.defaults
    most = usual or defaults.max_new_tokens
    if most is None and defaults.max_length is not None:
        most = defaults.max_length - size
        if most < 1:
            raise _too_long(defaults.max_length, f"{size} of the prompt alone", param)
    return room if most is None else min(most, room)


def of_field(error: InputError, body: GenerationBody) -> ApiError:
    """400 of what the engine refuses, with the field that its message begins with."""
    found = _FIELD.match(str(error))
    name, message = found[0] if found else "", str(error)
    if name == "adapter":
        return invalid(message.replace("adapter", "adapters", 1), "adapters")
    if name == "grammar":
        named = read_grammar(body)
        name = "tools" if named is None else named[0]
        return invalid(message.replace("grammar", name, 1), name)
    return invalid(message, name if name in body.__struct_fields__ else None)


def _too_long(length: int, what: str, param: str) -> ApiError:
    return ApiError(
        400,
        f"This model's maximum context length is {length} tokens. However, you requested more:"
        f" {what}. Shorten the prompt, or ask for fewer tokens.",
        code="context_length_exceeded",
        param=param,
    )
