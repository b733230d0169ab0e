"""JSON <-> frozen dataclasses, strictly.

A union of dataclasses is written as an object of one key, the class's `tag`, with its values under
it.
"""

import dataclasses
import json
import types
import typing
from typing import Any, Literal, get_args, get_origin

from ..errors import quoted

OPTIONAL = {"optional": True}
"""The metadata of a field that may be left out, and is where it has its default: one that joined a
format which readers know."""
_MAX_INTEGER = 2**63 - 1
"""What other languages read as an integer, and numpy and onnxruntime take."""


def strict_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for a key that is there twice, too."""
    return json.loads(text, object_pairs_hook=_unique)


def parse(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> the annotated type; TypeError or ValueError says where it does not fit."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = field_hints(kind)
        _check_object(value, where)
        required = set(hints) - set(optional_fields(kind))
        missing, unknown = sorted(required - set(value)), sorted(set(value) - set(hints))
        if missing:
            raise ValueError(f"{where}: key {missing[0]!r} is missing")
        if unknown:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}")
        values = {
            key: parse(hint, value[key], f"{where}.{key}")
            for key, hint in hints.items()
            if key in value
        }
        return kind(**values)  # type: ignore[operator]
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: expected one of {args}, got {value!r}")
        return value
    if members := union_members(kind):
        _check_object(value, where)
        if len(value) != 1 or not value.keys() <= members.keys():
            raise ValueError(
                f"{where}: expected one key of {tuple(members)}, got {', '.join(value) or 'none'}"
            )
        ((tag, content),) = value.items()
        return parse(members[tag], content, f"{where}.{tag}")
    if origin in (typing.Union, types.UnionType):
        return None if value is None else parse(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not ... and len(value) != len(args)):
            count = "" if args[-1] is ... else f" of {len(args)}"
            raise TypeError(f"{where}: expected a list{count}, got {value!r}")
        return tuple(parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _check_object(value, where)
        return {key: parse(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if type(value) is int and abs(value) > _MAX_INTEGER:
        raise ValueError(f"{where}: an integer of more than 64 bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value


def dump(kind: Any, value: Any) -> Any:
    """A value of the annotated type -> what `parse` takes."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        left_out = {
            name
            for name, default in optional_fields(kind).items()
            if getattr(value, name) == default
        }
        return {
            key: dump(hint, getattr(value, key))
            for key, hint in field_hints(kind).items()
            if key not in left_out
        }
    if union_members(kind):
        return {value.tag: dump(type(value), value)}
    if origin in (typing.Union, types.UnionType):
        return None if value is None else dump(args[0], value)
    if origin is tuple:
        return [dump(args[0], item) for item in value]
    if origin is dict:
        return {key: dump(args[1], item) for key, item in value.items()}
    return value


def field_hints(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass and their types."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def optional_fields(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass that may be left out, and what they are then."""
    fields = dataclasses.fields(kind)
    return {field.name: field.default for field in fields if field.metadata == OPTIONAL}


def union_members(kind: Any) -> dict[str, Any]:
    """A union's dataclasses by their tag; of any other type none."""
    members = get_args(kind) if get_origin(kind) in (typing.Union, types.UnionType) else ()
    if not members or not all(map(dataclasses.is_dataclass, members)):
        return {}
    return {member.tag: member for member in members}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {quoted(name)} is there twice")
        values[name] = value
    return values


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise TypeError(f"{where}: expected an object, got {value!r}")
