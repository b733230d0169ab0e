"""The sites of a whole model: where LoRA applies, which share an input, which are heads.

The model is built on the meta device, which imports transformers; no weight is read.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.foreign import read_object
from loraexport_runtime.contract.kinds import Facts, Packed, Tag, TensorEntry
from loraexport_runtime.contract.naming import Naming
from loraexport_runtime.errors import AdapterWeightsError, quoted

from ..errors import BaseModelError
from ..hf.checkpoint import read_float_weights
from ..hf.facts import read_facts
from ..hf.sentences.reader import read_tail
from ..hf.sentences.tail import Tail
from ..spec.schema import Spec, TransformersSpec
from .layer import LayerPlan, make_layer_plan
from .stacks import LORA
from .task import check_task

if TYPE_CHECKING:  # it imports torch
    from ..hf.skeleton import Skeleton

from .sites import check_copies, feature_roles, named_sites, share_inputs, site_layer

PACKED_TASKS = ("feature-extraction", "sentence-embedding", "token-classification")
"""Of texts whose padding may be left out: every output is of a token, or of a row's mean."""


PACKED_TYPES = ("bert", "roberta", "xlm-roberta")
"""Models that are told how many tokens are before each one."""


@dataclass(frozen=True)
class ModelPlan:
    """A whole model: where it lies, and what its graph takes and gives."""

    tag: ClassVar[Tag] = "model"

    directory: Path
    """Of its config, its weights and its tokenizer."""
    task: str
    tail: Tail | None
    """What is computed behind the model."""
    blend: bool
    packed: Packed | None
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    facts: Facts
    naming: Naming
    missing: tuple[str, ...]
    """Weights of the model that its files lack: none that a row without an adapter needs."""


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
    from ..hf.model import headless_widths, refuse_dynamic_rope, require_weights
    from ..hf.names.stored_names import read_coverage
    from ..hf.skeleton import read_skeleton
    from ..hf.tokenizer import find_files

    root, tail = directory, read_tail(directory, base.task)
    directory = root if tail is None else tail.folder
    check_task(directory, base.task)
    refuse_dynamic_rope(directory, base.task)
    skeleton = read_skeleton(directory, base.task, spec.export.dtype)
    lora, saved = _used_sites(headers, skeleton)
    check_copies(headers, skeleton)
    if spec.sites is not None:
        lora = named_sites(spec, skeleton.sites, skeleton.inner_linear)
    coverage = read_coverage(skeleton.model, read_float_weights(directory), directory)
    find_files(directory)  # which refuses what a build could not copy
    heads = _plan_heads(base.task, coverage.missing, spec, skeleton, saved)
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
        roles |= {"weight", "bias"} if head else feature_roles(features, shape)
        # The operator behind a layer of one slice takes its bias along: Gelu, the layer norm. Those
        # of q, k and v would be added in passes of their own.
        has_bias = len(group) > 1 and any(skeleton.sites[site].has_bias for site in group)
        plans.append(make_layer_plan(layer, (), False, spec, num_slots, roles, has_bias))
    headless = headless_widths(plan.layer for plan in plans)
    lists = coverage.required, coverage.unexpected
    require_weights(directory, base.task, skeleton.model, *lists, headless)
    inputs, outputs = skeleton.signature.inputs, skeleton.signature.outputs
    if tail is not None:
        inputs, outputs = tail.inputs(inputs), tail.outputs(outputs)
    for plan in plans:
        if plan.layer.labels:
            width = str(plan.layer.out_features)
            outputs = tuple(
                replace(output, shape=(*output.shape[:-1], width)) for output in outputs
            )
    packed = _packed(spec, base.task, directory, plans) if spec.export.packed else None
    model = ModelPlan(
        directory,
        base.task,
        tail,
        spec.export.blend,
        packed,
        inputs,
        outputs,
        read_facts(directory, root, skeleton.part),
        skeleton.naming,
        coverage.missing,
    )
    return tuple(plans), model


def _packed(spec: Spec, task: str, directory: Path, plans: Sequence[LayerPlan]) -> Packed:
    """Where the graph of texts without padding runs. Raises BaseModelError: there is none."""
    if task not in PACKED_TASKS:
        raise BaseModelError(
            f"export.packed: task {task!r} cannot be packed, but {', '.join(PACKED_TASKS)}; remove"
            " it"
        )
    model_type = read_object(directory / "config.json", BaseModelError).get("model_type")
    if model_type not in PACKED_TYPES:
        raise BaseModelError(
            f"export.packed: a model of type {quoted(model_type)} cannot be packed, but"
            f" {', '.join(PACKED_TYPES)}; remove it"
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
        _refuse_attentions(header, skeleton.attentions)
        for site, module in match_sites(header, skeleton.sites, skeleton.naming).items():
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


def _refuse_attentions(header: AdapterHeader, attentions: Collection[str]) -> None:
    """Raise AdapterWeightsError for LoRA on a torch.nn.MultiheadAttention, or inside one."""
    for module in (*header.modules, *header.saved):
        for name in attentions:
            if f".{name}." in f".{module}.":
                raise AdapterWeightsError(
                    f"{header.path}: module {module!r} is of {name!r}, a"
                    " torch.nn.MultiheadAttention, which computes with its layers' weights and"
                    " calls none of them, so that LoRA cannot join; retrain without it (peft:"
                    " exclude_modules)"
                )


def _plan_heads(
    task: str,
    missing: Collection[str],
    spec: Spec,
    skeleton: "Skeleton",
    saved: Mapping[str, int],
) -> dict[str, _Head]:
    """The layers that may differ whole. The last one of a classifier gives the labels.

    An adapter may have fewer labels than another; with a blend all have the same.
    """
    classifies = task.endswith("-classification")
    own_heads = skeleton.head if classifies else ()
    layers = {*own_heads, *skeleton.task_layers} if classifies else set()
    lacking = {site for site in layers if f"{site}.weight" in missing}
    sites = set(saved) | lacking
    if "heads" in (spec.features or ()):
        sites |= {site for site in layers if "pooler" not in site.split(".")[:-1]}
    heads = {}
    for site in sites:
        own_width = skeleton.sites[site].out_features
        is_labels = site in own_heads[-1:]
        in_base = site not in lacking
        width = own_width
        if is_labels and site in saved:
            width = max(saved[site], own_width if in_base else 0)
        heads[site] = _Head(width, in_base, is_labels and not spec.export.blend)
    return heads
