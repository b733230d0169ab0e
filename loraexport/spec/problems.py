"""What is wrong with a spec's data -> Problems in the words of a spec, each with line and hint."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import Problem
from .strict_yaml import SPEC, Format, Lines, dotted

KINDS = ("layers", "transformers", "causal_lm", "onnx")
"""Of a base."""

KeysAt = Callable[[tuple[str | int, ...]], list[str]]
"""The keys that the contract knows at the place of an unknown key."""


def cross_problems(data: Any, lines: Lines) -> list[Problem]:
    """What no single key shows: names given twice, two sources of one thing, or none."""
    base = _get(data, "base")
    layers = _items(base, "layers")
    problems = _same_names(_items(data, "adapters"), ("adapters",), lines)
    problems += _same_names(layers, ("base", "layers"), lines)
    problems += _model_keys(data, lines)
    if isinstance(base, dict) and base.get("kind") in (None, "layers"):
        given = [key for key in ("path", "init") if base.get(key) is not None]
        if len(given) != 1:
            seen = "both are given" if given else "neither is given"
            hint = "path for real weights, init: {seed: 0} for synthetic ones"
            message = f"give either path or init; {seen}"
            problems.append(Problem(lines.get(("base",), 1), "base", message, hint))
    for index, layer in enumerate(layers):
        place = ("base", "layers", index)
        slices = _items(layer, "slices")
        problems += _same_names(slices, (*place, "slices"), lines)
        own = [
            key
            for key in ("out_features", "site", "weight", "bias")
            if _get(layer, key) is not None and slices
        ]
        for key in own:
            at = (*place, key)
            message = f"{key} beside slices"
            hint = "move it into each of the slices"
            problems.append(Problem(lines[at], dotted(at), message, hint))
    return problems


def _model_keys(data: Any, lines: Lines) -> list[Problem]:
    """Keys that only whole models have a place for, and those that exclude each other."""
    hints = {
        ("sites",): "remove it; every listed layer is a site",
        ("features",): "remove it, or take the whole model as base.kind: transformers",
        ("export", "blend"): "remove it, or take the whole model as base.kind: transformers",
        ("export", "packed"): "remove it, or take the whole model as base.kind: transformers",
    }
    problems = []
    kind = _get(_get(data, "base"), "kind")
    if kind in ("causal_lm", "onnx"):
        del hints[("sites",)]
    if kind in ("layers", "causal_lm", "onnx"):
        for place, hint in hints.items():
            value = data
            for key in place:
                value = _get(value, key)
            if value is not None and value is not False:
                problems.append(Problem(lines[place], dotted(place), "for whole models only", hint))
    export = _get(data, "export")
    base = _get(data, "base")
    if _get(export, "dtype") == "bfloat16":
        at = ("export", "dtype")
        messages = {
            "int4 weights beside bfloat16": _get(base, "weights") == "int4",
            "an ONNX graph in bfloat16, which no CPU can be the reference for": kind == "onnx",
        }
        for message, is_so in messages.items():
            if is_so:
                hint = "take float16 or float32"
                problems.append(Problem(lines[at], dotted(at), message, hint))
    for index, rule in enumerate(_items(base, "sites") if kind == "onnx" else []):
        if isinstance(_get(rule, "site"), list) != (_get(rule, "widths") is not None):
            spot = ("base", "sites", index)
            message = "a list of sites and widths go together"
            hint = "give the outputs of each site, or one site alone"
            problems.append(Problem(lines[spot], dotted(spot), message, hint))
    if _get(export, "packed") is True:
        place = ("export", "packed")
        beside = {
            "blend": _get(export, "blend") is True,
            "bfloat16 (take float16)": _get(export, "dtype") == "bfloat16",
        }
        for what, is_so in beside.items():
            if is_so:
                message, hint = f"packed beside {what}", "remove one of the two"
                problems.append(Problem(lines[place], dotted(place), message, hint))
    strategy = _get(export, "strategy")
    if _get(export, "blend") is True and strategy not in (None, "auto", "masked"):
        message = f"{strategy!r} cannot blend slots"
        hint = "remove it, or take masked"
        place = ("export", "strategy")
        problems.append(Problem(lines[place], dotted(place), message, hint))
    return problems


def _same_names(items: list[Any], place: tuple[str | int, ...], lines: Lines) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for index, item in enumerate(items):
        name = _get(item, "name")
        if not isinstance(name, str):
            continue
        at = (*place, index, "name")
        if name in first:
            message = f"two are named {name!r}, the first on line {first[name]}"
            problems.append(Problem(lines[at], dotted(at), message, "give each its own name"))
        first.setdefault(name, lines[at])
    return problems


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None


def _items(data: Any, key: str) -> list[Any]:
    value = _get(data, key)
    return value if isinstance(value, list) else []


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
    given: dict[tuple[str | int, ...], Any] = {}
    problems = []
    for detail in details:
        location = _without_union_tags(detail["loc"], lines)
        if detail["type"] in _EXPECTED:
            expected.setdefault(location, []).append(_EXPECTED[detail["type"]])
            given[location] = detail["input"]
        elif detail["type"] != "too_short" or not detail["input"]:  # else its items are wrong
            problems.append(_problem(detail, location, lines, keys_at, kind))
    for location, kinds in expected.items():
        value = given[location]
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
    detail: Any, location: tuple[str | int, ...], lines: Lines, keys_at: KeysAt, file: Format
) -> Problem:
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    line, path = _line(location, lines), dotted(location)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), keys_at(location), n=1)
        hint = f"remove it; {file.keys}"
        return Problem(line, path, "unknown key", f"did you mean {near[0]!r}?" if near else hint)
    if kind == "missing":
        return Problem(line, path, "required key is missing", "add it")
    if kind == "literal_error":
        hint = "choose one" if "," in context["expected"] or " or " in context["expected"] else ""
        return Problem(line, path, f"expected {context['expected']}, got {_shown(given)}", hint)
    if kind == "union_tag_invalid":
        at = (*location, context["discriminator"].strip("'"))
        message = f"expected {context['expected_tags']}, got {_shown(context['tag'])}"
        return Problem(_line(at, lines), dotted(at), message, "choose one")
    if kind == "union_tag_not_found":
        key = context["discriminator"].strip("'")
        values = {"type": ("linear", "embedding"), "kind": KINDS}[key]
        hint = f"add {' or '.join(f'{key}: {value}' for value in values)}"
        return Problem(line, dotted((*location, key)), "required key is missing", hint)
    if kind in ("string_pattern_mismatch", "string_too_long"):
        hint = "letters, digits, '.', '_', '-', the first a letter or digit, at most 64"
        return Problem(line, path, f"{_shown(given)} is no name", hint)
    if kind == "too_short":
        return Problem(line, path, "empty", "give at least one")
    message = detail["msg"].lower().removeprefix("input ")
    return Problem(line, path, f"{message}, got {_shown(given)}", "")


def _without_union_tags(location: Sequence[str | int], lines: Lines) -> tuple[str | int, ...]:
    """Drop what pydantic adds for unions (`linear`, `str`): it is in no file."""
    kept: tuple[str | int, ...] = ()
    if len(location) > 1 and location[0] == "base" and location[1] in KINDS:
        location = (location[0], *location[2:])  # the kind, which pydantic puts between
    for index, part in enumerate(location):
        is_tag = part in ("linear", "embedding", "str", "bool")
        if is_tag and (*kept, part) not in lines:
            continue
        kept = (*kept, location[index])
    return kept
