"""The sites of a whole model: where LoRA applies, which share an input, which are heads.

The model is built on the meta device, which imports transformers; no weight is read.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.kinds import Facts, Packed, Tag, TensorEntry
from loraexport_runtime.errors import AdapterWeightsError

from ..errors import BaseModelError
from ..hf.checkpoint import read_checkpoint
from ..hf.facts import read_facts
from ..spec.schema import Spec, TransformersSpec
from .layer import LayerPlan, make_layer_plan
from .stacks import LORA

if TYPE_CHECKING:  # it imports torch
    from ..hf.skeleton import SiteShape, Skeleton

from .sites import named_sites, share_inputs, site_layer

PACKED_TASKS = ("feature-extraction", "sentence-embedding", "token-classification")
"""Of texts whose padding may be left out: every output is of a token, or of a row's mean."""


@dataclass(frozen=True)
class ModelPlan:
    """A whole model: where it lies, and what its graph takes and gives."""

    tag: ClassVar[Tag] = "model"

    directory: Path
    task: str
    blend: bool
    packed: Packed | None
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    facts: Facts


@dataclass(frozen=True)
class _Head:
    """A linear layer of which an adapter may bring a whole one of its own."""

    width: int
    """Outputs of the widest."""
    in_base: bool
    labels: bool


def plan_model(
    base: TransformersSpec,
    directory: Path,
    headers: Sequence[AdapterHeader],
    spec: Spec,
    num_slots: int,
    max_rank: int,
) -> tuple[tuple[LayerPlan, ...], ModelPlan]:
    """Plan a whole model's sites, a layer each or one for several that share their input.

    Raises:
        BaseModelError: the model cannot be built, or `sites` names none of its layers.
        AdapterWeightsError: an adapter has modules that the model lacks, or heads that do not fit.
    """
    from ..hf.skeleton import read_skeleton

    skeleton = read_skeleton(directory, base.task, spec.export.dtype)
    lora, saved = _used_sites(headers, skeleton)
    if spec.sites is not None:
        lora = named_sites(spec, skeleton.sites, skeleton.inner_linear)
    heads = _plan_heads(base.task, directory, headers, spec, skeleton, saved)
    features = set(spec.features or ()).union(*(header.features for header in headers))
    plans = []
    for group in share_inputs(skeleton, lora, heads):
        shape, head = skeleton.sites[group[0]], heads.get(group[0])
        widths = {site: skeleton.sites[site].out_features for site in group}
        layer = site_layer(widths, shape.in_features, shape.kind, max_rank)
        if head:
            layer = replace(
                layer,
                out_features=head.width,
                slices=(replace(layer.slices[0], width=head.width),),
                in_base=head.in_base,
                labels=head.labels,
            )
        roles = set(LORA if group[0] in lora else ())
        roles |= {"weight", "bias"} if head else _feature_roles(features, shape)
        # The operator behind a layer of one slice takes its bias along: Gelu, the layer norm. Those
        # of q, k and v would be added in passes of their own.
        has_bias = len(group) > 1 and any(skeleton.sites[site].has_bias for site in group)
        plans.append(make_layer_plan(layer, (), False, spec, num_slots, roles, has_bias))
    inputs, outputs = skeleton.signature.inputs, skeleton.signature.outputs
    for plan in plans:
        if plan.layer.labels:
            width = str(plan.layer.out_features)
            outputs = tuple(
                replace(output, shape=(*output.shape[:-1], width)) for output in outputs
            )
    packed = _packed(spec, base.task, plans) if spec.export.packed else None
    model = ModelPlan(
        directory,
        base.task,
        spec.export.blend,
        packed,
        inputs,
        outputs,
        read_facts(directory),
    )
    return tuple(plans), model


def _packed(spec: Spec, task: str, plans: Sequence[LayerPlan]) -> Packed:
    """Where the graph of texts without padding runs. Raises BaseModelError: there is none."""
    if task not in PACKED_TASKS:
        raise BaseModelError(
            f"export.packed: task {task!r} cannot be packed, but {', '.join(PACKED_TASKS)}; remove"
            " it"
        )
    for plan in plans:
        for stack in plan.layer.stacks:
            if stack.role not in LORA:
                raise BaseModelError(
                    f"export.packed: every slot has its own {stack.role} at {plan.layer.name!r}"
                    " (DoRA, a bias, or a head), which would be read for every token; remove it,"
                    " or build these adapters apart"
                )
    export = spec.export
    return "cuda" if (export.tune.device, export.dtype) == ("cuda", "float16") else "any"


def _used_sites(
    headers: Iterable[AdapterHeader], skeleton: "Skeleton"
) -> tuple[set[str], dict[str, int]]:
    """The sites of the adapters' LoRA, and of the layers that they bring whole: their widths."""
    lora: set[str] = set()
    saved: dict[str, int] = {}
    for header in headers:
        for site, module in match_sites(header, skeleton.sites).items():
            if module in header.modules:
                lora.add(site)
                continue
            if skeleton.sites[site].kind != "linear" or skeleton.sites[site].is_conv1d:
                raise AdapterWeightsError(
                    f"{header.path}: it brings {module!r}, trained whole (modules_to_save), which"
                    " is no torch.nn.Linear; only these can differ by row"
                )
            width = header.saved[module].out_features
            saved[site] = max(width, saved.get(site, 0))
    return lora, saved


def _plan_heads(
    task: str,
    directory: Path,
    headers: Sequence[AdapterHeader],
    spec: Spec,
    skeleton: "Skeleton",
    saved: Mapping[str, int],
) -> dict[str, _Head]:
    """The layers that may differ whole. The last one of a classifier gives the labels.

    An adapter may have fewer labels than another; with a blend all have the same.
    """
    classifies = task.endswith("-classification")
    own_heads = skeleton.head if classifies else ()
    sites = set(saved) | set(own_heads if "heads" in (spec.features or ()) else ())
    stored = read_checkpoint(directory) if sites & set(own_heads) else {}
    heads = {}
    for site in sites:
        own_width = skeleton.sites[site].out_features
        is_labels = site in own_heads[-1:]
        in_base = site not in own_heads or any(
            f".{name}".endswith(f".{site}.weight") for name in stored
        )
        width = own_width
        if is_labels and site in saved:
            width = max(saved[site], own_width if in_base else 0)
        heads[site] = _Head(width, in_base, is_labels and not spec.export.blend)
    return heads


def _feature_roles(features: Collection[str], shape: "SiteShape") -> set[str]:
    roles = {"output_scale"} if "dora" in features else set()
    if "bias" in features and shape.kind == "linear":
        roles.add("bias")
    return roles
