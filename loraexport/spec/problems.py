"""What is wrong with a spec's data -> Problems in the words of a spec, each with line and hint."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from loraexport_runtime.contract.strict_yaml import Format, Lines, Problem, dotted

from ..errors import SpecError

SPEC = Format("a spec, as specs/quickstart.yaml", "'loraexport schema' lists the keys", SpecError)
_NAME_LENGTH = 64
_HINTS = 100
"""Problems whose nearest key is looked for: of ten thousand nobody reads the hints."""
KINDS = ("layers", "transformers", "causal_lm", "onnx")
"""Of a base."""

KeysAt = Callable[[tuple[str | int, ...]], list[str]]
"""The keys that the contract knows at the place of an unknown key."""


_EXPECTED = {
    "string_type": "string",
    "int_type": "integer",
    "int_from_float": "integer",
    "float_type": "number",
    "bool_type": "true or false",
    "tuple_type": "list",
    "model_type": "mapping",
    "dict_type": "mapping",
    "model_attributes_type": "mapping",
}


def schema_problems(
    details: Sequence[Any], lines: Lines, keys_at: KeysAt, kind: Format = SPEC
) -> list[Problem]:
    """pydantic's findings in the words of a spec; one problem for all members of a union."""
    expected: dict[tuple[str | int, ...], list[str]] = {}
    values: dict[tuple[str | int, ...], Any] = {}
    problems: list[Problem] = []
    for detail in details:
        location = _without_union_tags(detail["loc"], lines)
        if detail["type"] in _EXPECTED:
            expected.setdefault(location, []).append(_EXPECTED[detail["type"]])
            values[location] = detail["input"]
        elif detail["type"] != "too_short" or not detail["input"]:  # else its items are wrong
            is_hinted = len(problems) < _HINTS
            problems.append(_problem(detail, location, lines, keys_at, kind, is_hinted))
    for location, kinds in expected.items():
        value = values[location]
        message = f"expected {' or '.join(kinds)}, got {_shown(value)}"
        hint = _type_hint(kinds[0], value)
        problems.append(Problem(_line(location, lines), dotted(location), message, hint))
    return problems


def _line(location: tuple[str | int, ...], lines: Lines) -> int:
    """The line of a value, or of the nearest one around it that the file has."""
    return next(lines[location[:n]] for n in range(len(location), -1, -1) if location[:n] in lines)


def _shown(value: Any) -> str:
    """A value as YAML writes it, shortened."""
    if value is None:
        return "nothing"
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _type_hint(expected: str, value: Any) -> str:
    if value is None:
        return "give it a value"
    if expected in ("integer", "number") and isinstance(value, str):
        pattern = r"[-+]?\d+" if expected == "integer" else r"[-+]?\d*\.?\d+([eE][-+]?\d+)?"
        if re.fullmatch(pattern, value):
            return "write it without quotes"
    return {
        "integer": "write a whole number, as 16",
        "number": "write a number, as 0.5 or 1e-5",
        "true or false": "write true or false, without quotes",
        "string": "put it in quotes",
        "list": "start each item with '- '",
        "mapping": "write it as key: value",
    }[expected]


def _problem(
    detail: Any,
    location: tuple[str | int, ...],
    lines: Lines,
    keys_at: KeysAt,
    file: Format,
    is_hinted: bool,
) -> Problem:
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    line, path = _line(location, lines), dotted(location)
    if kind == "extra_forbidden":
        name = str(location[-1])
        near = difflib.get_close_matches(name, keys_at(location), n=1) if is_hinted else []
        hint = f"remove it; {file.keys}"
        return Problem(line, path, "unknown key", f"did you mean {near[0]!r}?" if near else hint)
    if kind == "missing":
        return Problem(line, path, "required key is missing", "add it")
    if kind == "literal_error":
        hint = "choose one" if "," in context["expected"] or " or " in context["expected"] else ""
        return Problem(line, path, f"expected {context['expected']}, got {_shown(value)}", hint)
    if kind == "union_tag_invalid":
        at = (*location, context["discriminator"].strip("'"))
        message = f"expected {context['expected_tags']}, got {_shown(context['tag'])}"
        return Problem(_line(at, lines), dotted(at), message, "choose one")
    if kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        tags = {"type": ("linear", "embedding"), "kind": KINDS}[key]
        hint = f"add {' or '.join(f'{key}: {tag}' for tag in tags)}"
        return Problem(line, dotted((*location, key)), "required key is missing", hint)
    if kind == "string_too_long" and context["max_length"] > _NAME_LENGTH:
        message = f"{len(value):,} characters, got {_shown(value)}"
        return Problem(line, path, message, f"at most {context['max_length']:,}")
    if kind in ("string_pattern_mismatch", "string_too_long"):
        hint = "letters, digits, '.', '_', '-', the first a letter or digit, at most 64"
        return Problem(line, path, f"{_shown(value)} is no name", hint)
    if kind == "too_short":
        return Problem(line, path, "empty", "give at least one")
    message = detail["msg"].lower().removeprefix("input ")
    return Problem(line, path, f"{message}, got {_shown(value)}", "")


def _without_union_tags(location: Sequence[str | int], lines: Lines) -> tuple[str | int, ...]:
    """Drop what pydantic adds for unions (`linear`, `str`): it is in no file."""
    stripped: tuple[str | int, ...] = ()
    if len(location) > 1 and location[0] == "base" and location[1] in KINDS:
        location = (location[0], *location[2:])  # the kind, which pydantic puts between
    for index, part in enumerate(location):
        is_tag = part in ("linear", "embedding", "str", "constrained-str", "bool")
        if is_tag and (*stripped, part) not in lines:
            continue
        stripped = (*stripped, location[index])
    return stripped
