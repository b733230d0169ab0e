"""An answer's text -> its content, and the calls of tools in it, as Hermes and Qwen write them; and
the grammar of a text that is calls alone.

<tool_call>
{"name": "weather", "arguments": {"place": "Prague"}}
</tool_call>
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from loraexport_runtime import Grammar
from loraexport_runtime.generation.text.stream import overlap

from ...errors import invalid
from .messages import Function

START, END = "<tool_call>", "</tool_call>"


class CallOf(msgspec.Struct):
    """A call's function; arguments are the text of a JSON object."""

    name: str
    arguments: str


class Called(msgspec.Struct):
    """One call in an answer."""

    id: str
    function: CallOf
    index: int | UnsetType = UNSET
    """Of an event's call."""
    type: str = "function"


def call_grammar(functions: Sequence[Function], are_many: bool) -> Grammar:
    """Text that is a call of one of these functions, its arguments as the parameters' schema says.

    Args:
        are_many: others may follow, a line each.

    Raises:
        ApiError: 400: parameters are no object's.
    """
    opening, closing = json.dumps(f'{START}\n{{"name": '), json.dumps(f"}}\n{END}")
    names = " | ".join(f"call_{index}" for index in range(len(functions)))
    rules = [
        'start: call ("\\n" call)*' if are_many else "start: call",
        f"call: {opening} ({names}) {closing}",
    ]
    for index, function in enumerate(functions):
        schema = {"type": "object"} | (function.parameters or {"additionalProperties": False})
        if schema["type"] != "object":
            where = f"tools[{index}].function.parameters"
            raise invalid(f"{where} is no schema of an object", "tools")
        name = json.dumps(f'{json.dumps(function.name)}, "arguments": ')
        rules.append(f"call_{index}: {name} %json {json.dumps(schema)}")
    return Grammar("ebnf", "\n".join(rules) + "\n")


class CallReader:
    """The text of one answer as it comes. What is no call, though it begins as one, is content."""

    def __init__(self) -> None:
        self._held = ""
        """Text that may still be a call, or its beginning."""
        self._is_open = False
        """START has come, and is not part of what is held."""
        self.num_calls = 0

    def push(self, text: str) -> tuple[str, list[Called]]:
        """The content and the calls that are whole with this text."""
        self._held += text
        return self._collect(self._steps())

    def finish(self) -> tuple[str, list[Called]]:
        """What is left, once no text comes any more; a call need not have its END."""
        content, calls = self._collect(self._steps())
        rest, self._held = self._held, ""
        if not self._is_open:
            return content + rest, calls
        self._is_open = False
        call = self._read(rest)
        return (content + START + rest, calls) if call is None else (content, [*calls, call])

    def _collect(self, parts: Iterator[str | Called]) -> tuple[str, list[Called]]:
        given = list(parts)
        content = "".join(part for part in given if isinstance(part, str))
        return content, [part for part in given if isinstance(part, Called)]

    def _steps(self) -> Iterator[str | Called]:
        while True:
            tag = END if self._is_open else START
            before, found, after = self._held.partition(tag)
            if not found:
                if not self._is_open:
                    size = overlap(self._held, START)
                    settled = self._held[: len(self._held) - size]
                    self._held = self._held[len(settled) :]
                    yield self._trim(settled)
                return
            self._held = after
            if self._is_open:
                call = self._read(before)
                yield START + before + END if call is None else call
            else:
                yield self._trim(before)
            self._is_open = not self._is_open

    def _trim(self, content: str) -> str:
        """Lines that part calls from one another are no content."""
        return "" if self.num_calls and not content.strip() else content

    def _read(self, text: str) -> Called | None:
        try:
            value: Any = msgspec.json.decode(text)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            return None
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", {})
        if not isinstance(arguments, dict):
            return None
        called = CallOf(value["name"], msgspec.json.encode(arguments).decode())
        self.num_calls += 1
        return Called(f"call_{uuid.uuid4().hex}", called, self.num_calls - 1)
