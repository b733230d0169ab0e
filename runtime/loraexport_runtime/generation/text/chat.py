"""The messages of a chat, and what else a template may use -> the template and its variables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import InputError, quoted

DEFAULT, TOOL_USE = "default", "tool_use"
"""The names of the templates that are taken where none is asked for."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold what was thought before it; templates read the first two."""
_TAKEN = {
    "continue_final_message": "write the text of the chat, with the answer's beginning, and pass"
    " chat=False",
    "tokenize": "the runtime takes ids",
}
"""Names that no variable may have: transformers' function gives them a meaning of their own."""
_MAX_DEPTH = 64
"""Objects and lists in one another: as many as a template of JSON schemas needs, and more."""


@dataclass(frozen=True)
class ChatTemplates:
    """The templates of a tokenizer, by name; a tokenizer with one alone has it as `default`."""

    texts: Mapping[str, str]
    special_tokens: Mapping[str, str]
    """Variables of every template: `bos_token`, `eos_token` and the like."""

    def choose(self, name: str | None, has_tools: bool) -> str:
        """The text of a template by name; without one that for tools, if there are any, or default.

        Raises:
            InputError: there is none.
        """
        if not self.texts:
            raise InputError("the tokenizer has no chat template; give text")
        if name is None:
            name = TOOL_USE if has_tools and TOOL_USE in self.texts else DEFAULT
        if name not in self.texts:
            raise InputError(
                f"the tokenizer has no chat template {quoted(name)}; name one of"
                f" {quoted(sorted(self.texts))} as chat_template"
            )
        return self.texts[name]

    def variables(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any],
    ) -> dict[str, Any]:
        """What a template is rendered with, as transformers' `apply_chat_template` has it.

        Raises:
            InputError: a value is none of JSON's, or a name stands for something else.
        """
        for name in arguments:
            if name in _TAKEN:
                raise InputError(f"{name} is no variable of a chat template: {_TAKEN[name]}")
        chat = _objects(messages, "messages")
        if not chat:
            raise InputError("a chat has no message; give one at least")
        variables: dict[str, Any] = {**self.special_tokens, "add_generation_prompt": True}
        for name, value in arguments.items():
            variables[name] = _plain(value, name)
        variables["messages"] = [_message(message) for message in chat]
        variables["tools"] = None if tools is None else _objects(tools, "tools")
        variables["documents"] = None if documents is None else _objects(documents, "documents")
        return variables


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """Without its nulls, and with what was thought under the names that templates read."""
    values = {key: value for key, value in message.items() if value is not None}
    thought = next((values[key] for key in _REASONING if key in values), None)
    if thought is None:
        return values
    return {"thinking": thought} | values | {"reasoning_content": thought}


def _objects(values: Any, where: str) -> list[dict[str, Any]]:
    plain = _plain(values, where)
    if not isinstance(plain, list) or not all(isinstance(value, dict) for value in plain):
        raise InputError(f"{where} is {quoted(values)}; expected a list of objects")
    return plain


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value in JSON's types alone: nothing with methods of its own reaches a template."""
    if depth > _MAX_DEPTH:
        raise InputError(f"{where}: objects and lists more than {_MAX_DEPTH} deep; flatten them")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InputError(f"{where}: an object has a key that is no text; give texts alone")
        return {
            str.__str__(key): _plain(part, f"{where}.{key}", depth + 1)
            for key, part in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(part, f"{where}[{index}]", depth + 1) for index, part in enumerate(value)]
    raise InputError(
        f"{where} is {quoted(value)}; expected what JSON has: texts, numbers, true, false, null,"
        " lists and objects"
    )
