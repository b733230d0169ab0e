"""A YAML file -> a frozen Spec, or one SpecError that lists every problem with its line.

The models below are the contract: `loraexport schema` prints them as JSON Schema.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loraexport_runtime.manifest import DType

from .errors import Problem, SpecError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
Size = Annotated[int, Field(gt=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SliceSpec(_Model):
    """One output part of a fused layer, with its own A and B."""

    name: Name
    site: str | None = Field(
        None, description="module name that adapters use; default: from weight"
    )
    weight: str | None = Field(None, description="tensor name; default: <site>.weight")
    bias: str | bool | None = Field(
        None,
        description="tensor name, or true/false with init; default: <site>.bias where it exists",
    )
    out_features: Size | None = Field(None, description="checked against the tensor; init needs it")


class LinearSpec(_Model):
    """y = W x + b + LoRA. Either one weight here, or several slices that share x."""

    type: Literal["linear"]
    name: Name
    in_features: Size | None = None
    out_features: Size | None = None
    site: str | None = None
    weight: str | None = None
    bias: str | bool | None = None
    fan_in_fan_out: bool = Field(False, description="the weight is stored [in, out] (Conv1D)")
    slices: tuple[SliceSpec, ...] = ()

    @model_validator(mode="after")
    def _one_form(self) -> "LinearSpec":
        own = [
            key
            for key in ("out_features", "site", "weight", "bias")
            if getattr(self, key) is not None
        ]
        if self.slices and own:
            raise ValueError(f"{', '.join(own)} belongs into each of the slices, not beside them")
        return self


class EmbeddingSpec(_Model):
    """y[t] = E[ids[t]] + LoRA."""

    type: Literal["embedding"]
    name: Name
    num_embeddings: Size | None = None
    embedding_dim: Size | None = None
    site: str | None = None
    weight: str | None = None


LayerSpec = Annotated[LinearSpec | EmbeddingSpec, Field(discriminator="type")]


class InitSpec(_Model):
    """Synthetic weights: normal with variance 1 / in_features."""

    seed: Annotated[int, Field(ge=0)]


class BaseSpec(_Model):
    """The frozen model."""

    kind: Literal["layers"]
    path: str | None = Field(
        None,
        description="HF directory relative to the spec, hub id, or package:<module>/<folder>",
    )
    init: InitSpec | None = Field(None, description="synthetic weights instead of a path")
    layers: Annotated[tuple[LayerSpec, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_source(self) -> "BaseSpec":
        if (self.path is None) == (self.init is None):
            raise ValueError("give either path or init")
        return self


class AdapterSpec(_Model):
    """A PEFT LoRA directory or hub id."""

    name: Name
    path: str
    scale: Annotated[float, Field(allow_inf_nan=False)] = Field(
        1.0, description="multiplies the adapter's own scaling"
    )


class TuneSpec(_Model):
    """What strategy `auto` optimises for."""

    device: Literal["cpu", "cuda"] = "cuda"
    tokens: Size = Field(512, description="tokens of a typical batch, all rows together")


class ExportSpec(_Model):
    formats: Annotated[tuple[Literal["torchscript", "onnx"], ...], Field(min_length=1)] = (
        "torchscript",
        "onnx",
    )
    dtype: DType = "float32"
    strategy: Literal["auto", "segmented", "masked", "augmented", "chunked"] = "auto"
    tune: TuneSpec = TuneSpec()


class ParitySpec(_Model):
    """How the graphs are held to the float64 oracle."""

    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="largest relative error; default: the dtype's own"
    )
    tokens: Annotated[int, Field(ge=8)] = Field(24, description="tokens of the mixed cases")
    seed: Annotated[int, Field(ge=0)] = 0
    onnx: Literal["required", "deferred"] = Field(
        "required", description="deferred: publish bfloat16 without a CUDA device, unverified"
    )


class Spec(_Model):
    """What to build."""

    version: Literal[1]
    name: Name
    base: BaseSpec
    adapters: Annotated[tuple[AdapterSpec, ...], Field(min_length=1)]
    slots: Size | None = Field(None, description="slot 0 not counted; default: one per adapter")
    max_rank: Size | None = Field(None, description="default: the largest rank of these adapters")
    export: ExportSpec = ExportSpec()
    parity: ParitySpec = ParitySpec()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "Spec":
        for what, names in (
            ("adapters", [adapter.name for adapter in self.adapters]),
            ("base.layers", [layer.name for layer in self.base.layers]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{what}: two are named {twice[0]!r}; give each its own name")
        return self

    def to_yaml(self) -> str:
        """The resolved spec: every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """sha256 of the resolved spec, as hexadecimal text."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def read_spec(path: Path) -> Spec:
    """Read and check a spec.

    Raises:
        SpecError: with every problem of the file, each with line, path, and a hint.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        problem = Problem(
            1, "", "no such file", "give the path of a spec, as specs/quickstart.yaml"
        )
        raise SpecError(str(path), [problem]) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(str(path), [Problem(1, "", f"cannot be read as UTF-8: {error}")]) from error
    try:
        loader = _StrictLoader(text)
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpecError(str(path), [Problem(line, "", f"not YAML: {error.problem}")]) from error
    problems = list(loader.problems)
    try:
        spec = Spec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        details = [
            one for one in error.errors() if not (one["type"] == "too_short" and one["input"])
        ]
        problems += [_problem(detail, loader.lines) for detail in details]
    if problems:
        raise SpecError(str(path), problems)
    return spec


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors."""
    schema = Spec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars (`no` is text, 1e-5 is a number), duplicate keys noted, lines kept."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own form: a class attribute

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: dict[tuple[str | int, ...], int] = {(): 1}
        self.problems: list[Problem] = []

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._walk(node, ())
        return self.construct_document(node)

    def _walk(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._walk(item, (*path, index))
        elif isinstance(node, yaml.MappingNode):
            seen: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in seen:
                    message = f"duplicate key, first given on line {seen[name]}"
                    hint = "remove one of the two"
                    self.problems.append(Problem(line, _dotted((*path, name)), message, hint))
                seen.setdefault(name, line)
                self.lines[(*path, name)] = line
                self._walk(value, (*path, name))


for _tag, _pattern, _first in (
    ("null", r"^(?:null|Null|NULL|~|)$", ["n", "N", "~", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$",
        list("-+.0123456789"),
    ),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)

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
_HINTS = {
    "integer": "write it without quotes",
    "number": "write it without quotes",
    "string": "put it in quotes",
    "list": "start each item with '- '",
    "mapping": "write it as key: value",
}


def _problem(detail: Any, lines: dict[tuple[str | int, ...], int]) -> Problem:
    location = _without_union_tags(detail["loc"], lines)
    line = next(lines[location[:n]] for n in range(len(location), -1, -1) if location[:n] in lines)
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    path = _dotted(location)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys_beside(location), n=1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else "remove it; 'loraexport schema' lists the keys"
        )
        return Problem(line, path, "unknown key", hint)
    if kind == "missing":
        return Problem(line, path, "required key is missing", "add it")
    if kind in _EXPECTED:
        expected = _EXPECTED[kind]
        return Problem(line, path, f"expected {expected}, got {given!r}", _HINTS.get(expected, ""))
    if kind in ("literal_error", "union_tag_invalid"):
        expected = context.get("expected") or context.get("expected_tags")
        return Problem(
            line,
            path,
            f"expected {expected}, got {given!r}"
            if kind == "literal_error"
            else f"type: expected {expected}, got {context.get('tag')!r}",
            "choose one",
        )
    if kind == "union_tag_not_found":
        return Problem(line, path, "required key type is missing", "add type: linear or embedding")
    if kind == "string_pattern_mismatch":
        message = f"{given!r} is no name"
        return Problem(line, path, message, "letters, digits, '.', '_', '-', at most 64")
    if kind == "value_error":
        return Problem(line, path, str(context["error"]), "")
    return Problem(line, path, f"{detail['msg'].lower()}, got {given!r}", "")


def _without_union_tags(
    location: Sequence[str | int], lines: dict[tuple[str | int, ...], int]
) -> tuple[str | int, ...]:
    """Drop what pydantic adds for unions (`linear`, `str`): it is in no file."""
    kept: tuple[str | int, ...] = ()
    for index, part in enumerate(location):
        is_tag = part in (
            "linear",
            "embedding",
            "str",
            "bool",
            "function-after[_one_form(), linear]",
        )
        if is_tag and (*kept, part) not in lines:
            continue
        kept = (*kept, location[index])
    return kept


def _keys_beside(location: tuple[str | int, ...]) -> list[str]:
    """The keys that the contract knows at the place of an unknown key."""
    models: list[type[BaseModel]] = [Spec, BaseSpec, AdapterSpec, ExportSpec, TuneSpec, ParitySpec]
    models += [LinearSpec, EmbeddingSpec, SliceSpec, InitSpec]
    parents: dict[tuple[str, ...], list[type[BaseModel]]] = {
        (): [Spec],
        ("base",): [BaseSpec],
        ("base", "init"): [InitSpec],
        ("base", "layers"): [LinearSpec, EmbeddingSpec],
        ("base", "layers", "slices"): [SliceSpec],
        ("adapters",): [AdapterSpec],
        ("export",): [ExportSpec],
        ("export", "tune"): [TuneSpec],
        ("parity",): [ParitySpec],
    }
    parent = tuple(part for part in location[:-1] if isinstance(part, str))
    return [key for model in parents.get(parent, models) for key in model.model_fields]


def _dotted(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text
