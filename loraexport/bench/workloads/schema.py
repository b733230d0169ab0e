"""A YAML file -> frozen Workloads, or one SpecError that lists every problem with its line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loraexport_runtime.contract.manifest import DType, Strategy
from loraexport_runtime.contract.strict_yaml import Format, read_yaml

from ...errors import SpecError
from ...spec.problems import schema_problems
from ...spec.schema import Name, Size, Task
from .rules import cross_problems

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
    "base torch.compile",
    "segmented torch",
    "masked torch",
    "masked torch.compile",
    "PEFT",
    "one at a time",
    "base GenAI",
    "mixed GenAI",
    "GenAI static",
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
    mix_ranks: bool = Field(
        False, description="the adapters take the ranks in turn; default: a cell for each rank"
    )
    in_features: Size
    out_features: Size
    chain: Size = Field(1, description="layers one after another, which share one route")
    tokens: Sizes = Field(description="all rows together")
    rows: Size | None = Field(None, description="segments; default: one per adapter")
    strategies: Annotated[tuple[Strategy, ...], Field(min_length=1)] = ("masked", "augmented")

    @property
    def rank_sets(self) -> tuple[tuple[int, ...], ...]:
        """For each cell the ranks that its adapters take in turn."""
        return (self.ranks,) if self.mix_ranks else tuple((rank,) for rank in self.ranks)


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
    weights: Literal["float", "int4"] = Field("float", description="the base's, in its graph")
    rows: Sizes
    prompt_tokens: Size = 128
    new_tokens: Annotated[int, Field(ge=2)] = 64


class Traffic(_Model):
    """Requests that come at once, their lengths drawn log-uniform from two bounds."""

    requests: Size
    prompt_tokens: tuple[Size, Size]
    new_tokens: tuple[Annotated[int, Field(ge=2)], Size]


class Arrival(_Model):
    """Short prompts that come while rows decode and a long prompt is read."""

    decoding: Size = Field(30, description="rows that decode")
    long_prompt_tokens: Size = 4000
    prompt_tokens: Size = 32
    times: Annotated[int, Field(ge=3)] = Field(40, description="prompts that come")


class Chat(_Model):
    """A chat's first turn, and its second one, which begins with the first and its answer."""

    prompt_tokens: Size = 8000
    new_tokens: Size = Field(64, description="of the answer, and as many of the second turn")
    times: Annotated[int, Field(ge=1)] = Field(5, description="chats")


class EngineWorkload(_Workload):
    """A decoder in the runtime's engine: requests that join and leave the running batch."""

    kind: Literal["engine"]
    config: dict[str, Any] = Field(description="as of a model")
    rows: Size = Field(32, description="answers at the same time")
    quota: Annotated[int, Field(ge=2)] = Field(
        512, description="tokens of a prompt between two groups of steps"
    )
    traffic: Traffic | None = None
    arrival: Arrival | None = None
    chat: Chat | None = None


Workload = Annotated[
    LayersWorkload | ModelWorkload | GenerationWorkload | EngineWorkload,
    Field(discriminator="kind"),
]
_KINDS: dict[str, type[_Workload]] = {
    "layers": LayersWorkload,
    "model": ModelWorkload,
    "generation": GenerationWorkload,
    "engine": EngineWorkload,
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
    problems += cross_problems(data, lines, list(_KINDS))
    try:
        workloads = Workloads.model_validate_json(json.dumps(data))
    except ValidationError as error:
        details = [
            {**detail, "loc": _without_kind(detail["loc"])}
            for detail in error.errors()
            if detail["type"] != "union_tag_not_found"  # cross_problems names the kinds
        ]
        problems += schema_problems(details, lines, _keys_beside, WORKLOADS)
    if problems:
        raise SpecError(str(path), problems)
    return workloads


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
        ("workloads", "traffic"): [Traffic],
        ("workloads", "arrival"): [Arrival],
        ("workloads", "chat"): [Chat],
    }
    parent = tuple(part for part in location[:-1] if isinstance(part, str))
    return [key for model in parents.get(parent, ()) for key in model.model_fields]
