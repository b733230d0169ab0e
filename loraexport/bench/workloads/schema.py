"""A YAML file -> frozen Workloads, or one SpecError that lists every problem with its line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraexport_runtime.contract.manifest import DType, Strategy
from loraexport_runtime.contract.strict_yaml import Format, Lines, Problem, dotted, read_yaml

from ...errors import SpecError
from ...spec.problems import schema_problems
from ...spec.schema import Name, Size, Task

WORKLOADS = Format(
    "a file of workloads, as specs/bench/cpu.yaml",
    "specs/bench/ has examples",
    SpecError,
    "a file of workloads",
)

Distribution = Literal["one", "uniform", "zipf", "distinct"]
Peer = Literal[
    "base captured",
    "base torch",
    "segmented torch",
    "masked torch",
    "PEFT",
    "one at a time",
    "base GenAI",
    "mixed GenAI",
]
Variant = Literal["apart", "features", "blend"]
Sizes = Annotated[tuple[Size, ...], Field(min_length=1)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Workload(_Model):
    """Every combination of adapters, ranks and shapes is a cell of the tables."""

    name: Name
    adapters: Sizes = Field(description="numbers of adapters")
    ranks: Sizes = (16,)
    distribution: Distribution = Field(
        "distinct",
        description="of the adapters over the rows: the first for all; drawn alike, or with"
        " probability 1 / k; or each in turn",
    )
    leave_out: tuple[Peer, ...] = ()


class LayersWorkload(_Workload):
    """A chain of equal linear layers in one graph; the rows are segments of tokens."""

    kind: Literal["layers"]
    in_features: Size
    out_features: Size
    chain: Size = Field(1, description="layers one after another, which share one route")
    tokens: Sizes = Field(description="all rows together")
    rows: Size | None = Field(None, description="segments; default: one per adapter")
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = ("masked", "augmented")


class Shape(_Model):
    rows: Size
    tokens: Size = Field(description="of each row")

    @property
    def num_tokens(self) -> int:
        return self.rows * self.tokens


class ModelWorkload(_Workload):
    """A whole Hugging Face model of texts, with LoRA on every linear layer."""

    kind: Literal["model"]
    config: dict[str, Any] = Field(
        description="model_type, and values of its transformers config that differ from the default"
    )
    task: Task = "feature-extraction"
    shapes: Annotated[tuple[Shape, ...], Field(min_length=1)]
    fill: Annotated[float, Field(ge=0.5, le=1)] = Field(
        1.0,
        description="share of the tokens that are not padding: rows of different lengths, evenly"
        " spread up to a shape's tokens; below 1 packed graphs take part",
    )
    variants: tuple[Variant, ...] = Field(
        (),
        description="the mixed graph in other forms too: sites that share no product, places for"
        " DoRA and biases at every site, or weights of slots",
    )


class GenerationWorkload(_Workload):
    """A decoder: the prefill of all prompts, and greedy steps after it."""

    kind: Literal["generation"]
    config: dict[str, Any] = Field(description="as of a model")
    rows: Sizes
    prompt_tokens: Size = 128
    new_tokens: Annotated[int, Field(ge=2)] = 64


Workload = Annotated[
    LayersWorkload | ModelWorkload | GenerationWorkload, Field(discriminator="kind")
]
_KINDS: dict[str, type[_Workload]] = {
    "layers": LayersWorkload,
    "model": ModelWorkload,
    "generation": GenerationWorkload,
}


class Workloads(_Model):
    """What to measure, and how."""

    version: Literal[1]
    name: Name
    device: Literal["cpu", "cuda"]
    dtype: DType = "float32"
    threads: Size | None = Field(
        None, description="of torch and of each onnxruntime session; default: their own choice"
    )
    seed: Annotated[int, Field(ge=0)] = 0
    rounds: Annotated[int, Field(ge=3)] = Field(7, description="of which median and quartiles are")
    round_ms: Size = Field(50, description="calls of a contestant in a round take about as long")
    workloads: Annotated[tuple[Workload, ...], Field(min_length=1)]


def read_workloads(path: Path) -> Workloads:
    """Read and check a file of workloads.

    Raises:
        SpecError: with every problem of the file, each with line, path, and a hint.
    """
    data, lines, problems = read_yaml(path, WORKLOADS)
    problems += _cross_problems(data, lines)
    try:
        workloads = Workloads.model_validate_json(json.dumps(data))
    except ValidationError as error:
        details = [
            {**detail, "loc": _without_kind(detail["loc"])}
            for detail in error.errors()
            if detail["type"] != "union_tag_not_found"  # _cross_problems names the kinds
        ]
        problems += schema_problems(details, lines, _keys_beside, WORKLOADS)
    if problems:
        raise SpecError(str(path), problems)
    return workloads


def _cross_problems(data: Any, lines: Lines) -> list[Problem]:
    """What no single key shows: names twice, a chain that does not fit, values no config has."""
    problems: list[Problem] = []
    items = data.get("workloads") if isinstance(data, dict) else None
    first: dict[str, int] = {}
    for index, item in enumerate(items if isinstance(items, list) else []):
        if not isinstance(item, dict):
            continue
        place = ("workloads", index)
        name = item.get("name")
        if isinstance(name, str) and name in first:
            line, path = lines[(*place, "name")], dotted((*place, "name"))
            message = f"two are named {name!r}, the first on line {first[name]}"
            problems.append(Problem(line, path, message, "give each its own name"))
        if isinstance(name, str):
            first.setdefault(name, lines[(*place, "name")])
        if "kind" not in item:
            path = dotted((*place, "kind"))
            hint = f"add one of {', '.join(f'kind: {kind}' for kind in _KINDS)}"
            problems.append(Problem(lines[place], path, "required key is missing", hint))
        chain = item.get("chain")
        if (
            isinstance(chain, int)
            and chain > 1
            and item.get("in_features") != item.get("out_features")
        ):
            message = f"{chain} layers of which each takes what the one before it gives"
            hint = "make in_features and out_features equal, or leave chain out"
            at = (*place, "chain")
            problems.append(Problem(lines[at], dotted(at), message, hint))
        if isinstance(item.get("config"), dict):
            problems += _config_problems(item["config"], (*place, "config"), lines)
    return problems


def _config_problems(
    config: dict[str, Any], place: tuple[str | int, ...], lines: Lines
) -> list[Problem]:
    """transformers takes any key of a config without a word; here a typo is an error."""
    import difflib

    import transformers

    kind = config.get("model_type")
    if kind is None:
        hint = "add it, as model_type: bert"
        path = dotted((*place, "model_type"))
        return [Problem(lines[place], path, "required key is missing", hint)]
    try:
        defaults = transformers.AutoConfig.for_model(kind).to_dict()
    except ValueError:
        at = (*place, "model_type")
        message = f"transformers {transformers.__version__} knows no model of type {kind!r}"
        return [Problem(lines[at], dotted(at), message, "write it as a config.json does")]
    problems = []
    for key in sorted(set(config) - set(defaults)):
        near = difflib.get_close_matches(key, defaults, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the config of {kind} has no such key"
        at = (*place, key)
        problems.append(Problem(lines[at], dotted(at), "unknown key", hint))
    return problems


def _without_kind(location: Sequence[str | int]) -> tuple[str | int, ...]:
    """`("workloads", 0, "layers", "tokens")` without the kind, which is in no file."""
    place = tuple(location)
    if len(place) > 2 and place[0] == "workloads" and place[2] in _KINDS:
        return place[:2] + place[3:]
    return place


def _keys_beside(location: tuple[str | int, ...]) -> list[str]:
    """The keys that are known at the place of an unknown key."""
    parents: dict[tuple[str, ...], Sequence[type[BaseModel]]] = {
        (): [Workloads],
        ("workloads",): list(_KINDS.values()),
        ("workloads", "shapes"): [Shape],
    }
    parent = tuple(part for part in location[:-1] if isinstance(part, str))
    return [key for model in parents.get(parent, ()) for key in model.model_fields]
