"""Plain data -> a struct, or every problem at once, each with its line and a hint."""

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

import msgspec

from loraexport_runtime.contract.strict_yaml import Lines, Problem, dotted
from loraexport_runtime.errors import quoted

Location = tuple[str | int, ...]


def find_problems(data: Any, kind: Any, lines: Lines, at: Location = ()) -> list[Problem]:
    """What is wrong with a value that is to be of a type; structs and mappings are looked into."""
    struct = _struct_of(kind, data)
    if struct is not None:
        return _struct_problems(data, struct, lines, at)
    values = _values_of(kind)
    if values is not None and isinstance(data, Mapping):
        problems = [
            problem
            for key, value in data.items()
            for problem in find_problems(value, values, lines, (*at, key))
        ]
        if problems:
            return problems
    try:
        msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as error:
        message, _, inner = str(error).partition(" - at `$")
        place = dotted(at) + inner.rstrip("`").removesuffix("[...]")
        return [Problem(_line(at, lines), place, f"{message}, got {quoted(data)}".lower())]
    return []


def _struct_problems(
    data: Mapping[str, Any], kind: type[msgspec.Struct], lines: Lines, at: Location
) -> list[Problem]:
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    problems = []
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "remove it; --help lists the keys"
            place = (*at, key)
            problems.append(Problem(_line(place, lines), dotted(place), "unknown key", hint))
    for name, field in fields.items():
        if name in data:
            problems += find_problems(data[name], field.type, lines, (*at, name))
        elif field.required:
            place = (*at, name)
            line = _line(place, lines)
            problems.append(Problem(line, dotted(place), "required key is missing", "add it"))
    return problems


def _struct_of(kind: Any, data: Any) -> type[msgspec.Struct] | None:
    """The struct that a mapping is to be, of a type or of one of a union."""
    if not isinstance(data, Mapping):
        return None
    members = get_args(kind) if get_origin(kind) is not dict else ()
    every = [kind, *members, *(inner for member in members for inner in get_args(member))]
    return next(
        (one for one in every if isinstance(one, type) and issubclass(one, msgspec.Struct)), None
    )


def _values_of(kind: Any) -> Any:
    """The type of a mapping's values; None of what is no mapping."""
    for one in (kind, *get_args(kind)):
        if get_origin(one) is dict:
            return get_args(one)[1]
    return None


def _line(at: Location, lines: Lines) -> int:
    """The line of a value, or of the nearest one around it that the file has."""
    return next((lines[at[:n]] for n in range(len(at), -1, -1) if at[:n] in lines), 1)


def hints(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The annotated type of each key."""
    return get_type_hints(kind, include_extras=True)
