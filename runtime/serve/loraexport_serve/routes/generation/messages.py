"""The messages and tools of a chat, as OpenAI's clients send them -> what templates read."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from ...errors import invalid, unsupported
from ..common import Body

_Name = Annotated[str, Meta(min_length=1, max_length=256)]


class TextPart(Body, kw_only=True):
    type: Literal["text"]
    text: str


class CalledFunction(Body, kw_only=True):
    name: _Name
    arguments: str
    """A JSON object."""


class ToolCall(Body, kw_only=True):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    """Of no effect; pieces of a stream have it."""


class Message(Body, kw_only=True):
    """One turn. `null` is the same as absent."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    """system, developer, user, assistant, tool, or whatever else the model's template reads."""
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """What was thought ahead of an answer."""
    reasoning: str | None = None
    """The same."""
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Meta(max_length=0)] | None = None


class Function(Body, kw_only=True):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema."""
    strict: bool | None = None


class Tool(Body, kw_only=True):
    type: Literal["function"]
    function: Function


class FunctionName(Body, kw_only=True):
    name: _Name


class ToolChoice(Body, kw_only=True):
    """A call of this function."""

    type: Literal["function"]
    function: FunctionName


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Each as a template reads it: content is one text, arguments are objects.

    Raises:
        ApiError: 400: arguments are no object.
    """
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def template_tools(tools: Sequence[Tool], are_strict: bool = False) -> list[dict[str, Any]]:
    """Each as its JSON.

    Args:
        are_strict: calls are held to the schemas.

    Raises:
        ApiError: 400: one is to be strict, and they are not.
    """
    described = []
    for index, tool in enumerate(tools):
        if tool.function.strict and not are_strict:
            raise unsupported(
                f"tools[{index}].function.strict",
                "arguments are held to the schema where tool_choice forces a call alone",
            )
        described.append({"type": tool.type, "function": _without_none(tool.function)})
    return described


def _message(message: Message, where: str) -> dict[str, Any]:
    values = _without_none(message)
    if isinstance(message.content, list):
        values["content"] = "\n".join(part.text for part in message.content)
    if message.tool_calls is not None:
        values["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{index}]")
            for index, call in enumerate(message.tool_calls)
        ]
    return values


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise invalid(f"{where}.function.arguments: no JSON: {error}", "messages") from error
    if not isinstance(arguments, dict):
        raise invalid(f"{where}.function.arguments is no JSON object", "messages")
    values: dict[str, Any] = {"type": call.type}
    if call.id is not None:
        values["id"] = call.id
    return values | {"function": {"name": call.function.name, "arguments": arguments}}


def _without_none(struct: msgspec.Struct) -> dict[str, Any]:
    fields = msgspec.structs.asdict(struct)
    return {name: value for name, value in fields.items() if value is not None}
