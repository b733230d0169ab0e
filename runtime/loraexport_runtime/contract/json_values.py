"""JSON -> frozen dataclasses, strictly."""

import dataclasses
import types
import typing
from typing import Any, Literal, get_args, get_origin


def parse(kind: Any, value: Any, where: str) -> Any:
    """JSON value -> the annotated type; TypeError or ValueError says where it does not fit."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{where}: expected an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        missing, unknown = sorted(set(hints) - set(value)), sorted(set(value) - set(hints))
        if missing:
            raise ValueError(f"{where}: key {missing[0]!r} is missing")
        if unknown:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}")
        values = {key: parse(hint, value[key], f"{where}.{key}") for key, hint in hints.items()}
        return kind(**values)  # type: ignore[operator]
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: expected one of {args}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else parse(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not ... and len(value) != len(args)):
            count = "" if args[-1] is ... else f" of {len(args)}"
            raise TypeError(f"{where}: expected a list{count}, got {value!r}")
        return tuple(parse(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError(f"{where}: expected an object, got {value!r}")
        return {key: parse(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
