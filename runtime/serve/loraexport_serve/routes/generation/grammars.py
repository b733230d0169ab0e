"""response_format, and vLLM's guided_* and structured_outputs -> what an answer's text is to be."""

import re
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loraexport_runtime import Grammar

from ...errors import ApiError, invalid
from ..common import Body, OfModel

_Json = dict[str, Any] | str
_Choices = Annotated[list[str], Meta(min_length=1, max_length=1024)]


class JsonSchema(Body, kw_only=True):
    name: Annotated[str, Meta(max_length=256)]
    schema: dict[str, Any] | None = None
    """Absent: any object."""
    description: str | None = None
    strict: bool | None = None
    """Of no effect: every answer matches."""


class ResponseFormat(Body, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body, kw_only=True):
    """One of these."""

    json: _Json | None = None
    regex: str | None = None
    choice: _Choices | None = None
    grammar: str | None = None
    """In Lark's notation."""
    json_object: bool | None = None


class GrammarBody(OfModel, kw_only=True):
    """At most one of these."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Json | None = None
    guided_regex: str | None = None
    guided_choice: _Choices | None = None
    guided_grammar: str | None = None
    """In Lark's notation."""


def read_grammar(body: GrammarBody) -> tuple[str, Grammar] | None:
    """The field that names a request's grammar, and the grammar. Raises ApiError (400)."""
    given: dict[str, Grammar] = {}
    more = body.structured_outputs or StructuredOutputs()
    pairs = [
        ("guided_json", "json_schema", _schema(body.guided_json, "guided_json")),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "regex", _one_of(body.guided_choice)),
        ("guided_grammar", "ebnf", body.guided_grammar),
        ("structured_outputs.json", "json_schema", _schema(more.json, "structured_outputs")),
        ("structured_outputs.regex", "regex", more.regex),
        ("structured_outputs.choice", "regex", _one_of(more.choice)),
        ("structured_outputs.grammar", "ebnf", more.grammar),
        ("structured_outputs.json_object", "json_schema", _OBJECT if more.json_object else None),
        ("response_format", "json_schema", _format(body.response_format)),
    ]
    for name, kind, text in pairs:
        if text is not None:
            given[name] = Grammar(kind, text)  # type: ignore[arg-type]
    if len(given) > 1:
        raise invalid(f"{' and '.join(given)} exclude each other; give one", next(iter(given)))
    return next(iter(given.items()), None)


_OBJECT = '{"type":"object"}'


def _format(given: ResponseFormat | None) -> str | None:
    param = "response_format"
    if given is None:
        return None
    if (given.type == "json_schema") != (given.json_schema is not None):
        raise invalid(f"{param}: json_schema goes with its own type, and only with that", param)
    if given.type == "text":
        return None
    if given.json_schema is None or given.json_schema.schema is None:
        return _OBJECT
    return _schema(given.json_schema.schema, param)


def _schema(schema: _Json | None, param: str) -> str | None:
    """JSON of a schema, which is never text that nobody has read. Raises ApiError (400)."""
    if schema is None:
        return None
    try:
        value = msgspec.json.decode(schema) if isinstance(schema, str) else schema
        text = msgspec.json.encode(value).decode()
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _no_schema(param, str(error)) from error
    if not isinstance(value, dict):
        raise _no_schema(param, "it is no object")
    return text


def _no_schema(param: str, why: str) -> ApiError:
    return invalid(f"{param} is no JSON schema: {why}", param)


def _one_of(choices: list[str] | None) -> str | None:
    return None if choices is None else "|".join(f"(?:{re.escape(text)})" for text in choices)
