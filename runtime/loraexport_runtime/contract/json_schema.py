"""The JSON Schema of manifest.json, from the dataclasses that read it.

python -m loraexport_runtime.contract.json_schema > artifacts/manifest.schema.json
"""

import ast
import dataclasses
import inspect
import json
import textwrap
import types
import typing
from typing import Any, Literal, get_args, get_origin

from .json_values import field_hints, optional_fields, union_members
from .manifest import FORMAT_VERSION, Manifest

_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def manifest_schema() -> dict[str, Any]:
    """JSON Schema 2020-12: what `Manifest.read` takes, but for what parts say of each other."""
    definitions: dict[str, Any] = {}
    _schema(Manifest, definitions)
    manifest = definitions.pop(Manifest.__name__)
    manifest["properties"]["format_version"] = {"const": FORMAT_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"manifest.json of a loraexport artifact, format {FORMAT_VERSION}",
        **manifest,
        "$defs": dict(sorted(definitions.items())),
    }


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type; those of dataclasses go to `definitions`, by name."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        name = getattr(kind, "__name__", "")
        if name not in definitions:
            definitions[name] = {}  # its place, while its fields are described
            definitions[name] = _object(kind, definitions)
        return {"$ref": f"#/$defs/{name}"}
    if origin is Literal:
        return {"enum": list(args)}
    if members := union_members(kind):
        return {"oneOf": [_one_key(tag, member, definitions) for tag, member in members.items()]}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema(args[0], definitions), {"type": "null"}]}
    if origin is tuple and args[-1] is ...:
        return {"type": "array", "items": _schema(args[0], definitions)}
    if origin is tuple:
        sizes = {"minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "items": _schema(args[0], definitions), **sizes}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(args[1], definitions)}
    return {"type": _NAMES[kind]}


def _object(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    notes = _notes(kind)
    properties = {}
    for name, hint in field_hints(kind).items():
        note = {"description": notes[name]} if name in notes else {}
        properties[name] = note | _schema(hint, definitions)
    text = inspect.getdoc(kind) or ""
    # A dataclass without a docstring has its signature for one.
    described = {} if text.startswith(f"{kind.__name__}(") else {"description": _flat(text)}
    return {
        **described,
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional_fields(kind)],
        "additionalProperties": False,
    }


def _one_key(tag: str, kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {tag: _schema(kind, definitions)},
        "required": [tag],
        "additionalProperties": False,
    }


def _notes(kind: Any) -> dict[str, str]:
    """The text under each field of a dataclass."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef), "a dataclass is a class"
    notes = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            target, value = field.target, text.value
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                notes[target.id] = _flat(str(value.value))
    return notes


def _flat(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(json.dumps(manifest_schema(), indent=2, ensure_ascii=False))
