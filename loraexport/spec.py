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
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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

    # The rules between keys are `_cross_problems`: a validator here would hide behind other errors.

    version: Literal[1]
    name: Name
    base: BaseSpec
    adapters: Annotated[tuple[AdapterSpec, ...], Field(min_length=1)]
    slots: Size | None = Field(None, description="slot 0 not counted; default: one per adapter")
    max_rank: Size | None = Field(None, description="default: the largest rank of these adapters")
    export: ExportSpec = ExportSpec()
    parity: ParitySpec = ParitySpec()

    def to_yaml(self) -> str:
        """The resolved spec: every default written out."""
        data = self.model_dump(mode="json")
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)

    def digest(self) -> str:
        """sha256 of the resolved spec, as hexadecimal text."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def read_spec(path: Path) -> Spec:
    """Read and check a spec.

    Raises:
        SpecError: with every problem of the file, each with line, path, and a hint.
    """
    data, lines, problems = _parse(path)
    problems += _cross_problems(data, lines)
    try:
        spec = Spec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        problems += _problems(error.errors(), lines)
    if problems:
        raise SpecError(str(path), problems)
    return spec


def _parse(path: Path) -> tuple[Any, "_Lines", list[Problem]]:
    """The data of a YAML file, the line of every value, and the duplicate keys."""
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        hint = "give the path of a spec, as specs/quickstart.yaml"
        raise SpecError(source, [Problem(1, "", "no such file", hint)]) from error
    except UnicodeDecodeError as error:
        problem = Problem(1, "", f"not UTF-8 text: {error}", "save it as UTF-8")
        raise SpecError(source, [problem]) from error
    except OSError as error:
        hint = "give a YAML file that can be read"
        raise SpecError(source, [Problem(1, "", f"{error.strerror}", hint)]) from error
    try:
        loader = _StrictLoader(text)
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        prefix = "" if isinstance(error, yaml.constructor.ConstructorError) else "not YAML: "
        raise SpecError(source, [Problem(line, "", f"{prefix}{error.problem}")]) from error
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise SpecError(source, [Problem(1, "", f"not YAML: {first}")]) from error
    except RecursionError as error:
        raise SpecError(source, [Problem(1, "", "not YAML: nested too deeply")]) from error
    if data is None:
        hint = "'loraexport schema' lists the keys"
        raise SpecError(source, [Problem(1, "", "the file is empty", hint)])
    return data, loader.lines, loader.problems


def _cross_problems(data: Any, lines: "_Lines") -> list[Problem]:
    """What no single key shows: names given twice, two sources of one thing, or none."""
    base = _get(data, "base")
    layers = _items(base, "layers")
    problems = _same_names(_items(data, "adapters"), ("adapters",), lines)
    problems += _same_names(layers, ("base", "layers"), lines)
    if isinstance(base, dict):
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
            problems.append(Problem(lines[at], _dotted(at), message, hint))
    return problems


def _same_names(items: list[Any], place: tuple[str | int, ...], lines: "_Lines") -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for index, item in enumerate(items):
        name = _get(item, "name")
        if not isinstance(name, str):
            continue
        at = (*place, index, "name")
        if name in first:
            message = f"two are named {name!r}, the first on line {first[name]}"
            problems.append(Problem(lines[at], _dotted(at), message, "give each its own name"))
        first.setdefault(name, lines[at])
    return problems


def _get(data: Any, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None


def _items(data: Any, key: str) -> list[Any]:
    value = _get(data, key)
    return value if isinstance(value, list) else []


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a spec, for editors."""
    schema = Spec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


_Lines = dict[tuple[str | int, ...], int]
"""Where each value of a file stands: its path -> its 1-based line."""

_MAX_VALUES = 100_000


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2 scalars (`no` is text, 1e-5 is a number), duplicate keys noted, lines kept."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  PyYAML's own form: a class attribute

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: _Lines = {(): 1}
        self.problems: list[Problem] = []
        self._num_values = 0

    def get_single_data(self) -> Any:
        node = self.get_single_node()
        if node is None:
            return None
        self._walk(node, ())
        return self.construct_document(node)

    def _walk(self, node: yaml.Node, path: tuple[str | int, ...]) -> None:
        self._num_values += 1
        if self._num_values > _MAX_VALUES:  # a few nested aliases make billions
            message = f"more than {_MAX_VALUES:,} values, aliases written out"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        if not node.tag.startswith(_YAML_TAG) or node.tag.removeprefix(_YAML_TAG) not in _TAGS:
            message = f"tag {node.tag!r} is not allowed in a spec; write the plain value"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
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

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, always: YAML 1.1 reads 010 as eight."""
        return int(self.construct_scalar(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_scalar(node))


class _Dumper(yaml.SafeDumper):
    """Quotes text that _StrictLoader or another YAML reader would take for something else."""


_YAML_TAG = "tag:yaml.org,2002:"
_TAGS = ("map", "seq", "str", "null", "bool", "int", "float")
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
    for _class in (_StrictLoader, _Dumper):
        _class.add_implicit_resolver(_YAML_TAG + _tag, re.compile(_pattern), _first)
_StrictLoader.add_constructor(_YAML_TAG + "int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor(_YAML_TAG + "float", _StrictLoader.construct_yaml_float)

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


def _problems(details: Sequence[Any], lines: _Lines) -> list[Problem]:
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
            problems.append(_problem(detail, location, lines))
    for location, kinds in expected.items():
        value = given[location]
        message = f"expected {' or '.join(kinds)}, got {_shown(value)}"
        hint = _type_hint(kinds[0], value)
        problems.append(Problem(_line(location, lines), _dotted(location), message, hint))
    return problems


def _line(location: tuple[str | int, ...], lines: _Lines) -> int:
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


def _problem(detail: Any, location: tuple[str | int, ...], lines: _Lines) -> Problem:
    kind, given, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    line, path = _line(location, lines), _dotted(location)
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(location[-1]), _keys_beside(location), n=1)
        hint = "remove it; 'loraexport schema' lists the keys"
        return Problem(line, path, "unknown key", f"did you mean {near[0]!r}?" if near else hint)
    if kind == "missing":
        return Problem(line, path, "required key is missing", "add it")
    if kind == "literal_error":
        hint = "choose one" if "," in context["expected"] or " or " in context["expected"] else ""
        return Problem(line, path, f"expected {context['expected']}, got {_shown(given)}", hint)
    if kind == "union_tag_invalid":
        at = (*location, "type")
        message = f"expected {context['expected_tags']}, got {_shown(context['tag'])}"
        return Problem(_line(at, lines), _dotted(at), message, "choose one")
    if kind == "union_tag_not_found":
        message, hint = "required key is missing", "add type: linear or type: embedding"
        return Problem(line, _dotted((*location, "type")), message, hint)
    if kind in ("string_pattern_mismatch", "string_too_long"):
        hint = "letters, digits, '.', '_', '-', the first a letter or digit, at most 64"
        return Problem(line, path, f"{_shown(given)} is no name", hint)
    if kind == "too_short":
        return Problem(line, path, "empty", "give at least one")
    message = detail["msg"].lower().removeprefix("input ")
    return Problem(line, path, f"{message}, got {_shown(given)}", "")


def _without_union_tags(location: Sequence[str | int], lines: _Lines) -> tuple[str | int, ...]:
    """Drop what pydantic adds for unions (`linear`, `str`): it is in no file."""
    kept: tuple[str | int, ...] = ()
    for index, part in enumerate(location):
        is_tag = part in ("linear", "embedding", "str", "bool")
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
