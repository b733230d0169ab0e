"""Spec + file headers -> a frozen Plan: layers, ranks, slots, strategy and why, bytes and FLOPs.

No tensor data, and for layers no torch: it takes well under two seconds. A whole model is built on
the meta device to see its sites, which imports transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from loraexport_runtime.adapters.fit import check_fit
from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.foreign import has_file
from loraexport_runtime.contract.genai_config import GENAI_CONFIG
from loraexport_runtime.contract.manifest import AdapterSite
from loraexport_runtime.contract.naming import Naming
from loraexport_runtime.contract.strict_yaml import Problem
from loraexport_runtime.errors import AdapterError

from ..errors import BaseModelError, SpecError
from ..hf.sources import resolve_directory
from ..spec.schema import BaseSpec, CausalLmSpec, LayersSpec, OnnxSpec, Spec, TransformersSpec
from .decoder import DecoderPlan, plan_decoder
from .graph import GraphPlan, plan_graph
from .layer import LayerPlan
from .layers import LayersPlan, plan_layers
from .model import ModelPlan, plan_model


@dataclass(frozen=True)
class AdapterPlan:
    """An adapter, which module of it applies at which site, and where it starts."""

    name: str
    source: str
    scale: float
    slot: int | None
    header: AdapterHeader = field(repr=False)
    modules: dict[str, str]
    """Site -> module name in the adapter's files."""
    sites: dict[str, AdapterSite]
    heads: tuple[str, ...]
    """The sites of which it brings a whole layer (modules_to_save)."""


PlanKind = LayersPlan | ModelPlan | DecoderPlan | GraphPlan
KindT = TypeVar("KindT", bound=PlanKind, covariant=True)


@dataclass(frozen=True)
class Plan(Generic[KindT]):
    """Everything that a build needs to know before it reads a weight."""

    spec: Spec
    num_slots: int
    max_rank: int
    layers: tuple[LayerPlan, ...]
    """The graphs of kind layers, or the sites in the one graph of the other kinds."""
    kind: KindT
    adapters: tuple[AdapterPlan, ...]
    base_source: str

    @property
    def missing(self) -> tuple[str, ...]:
        """Weights of a Hugging Face model that its files lack; none of other bases."""
        return self.kind.missing if isinstance(self.kind, ModelPlan | DecoderPlan) else ()


AnyPlan = Plan[PlanKind]

_MAX_BYTES = 2**40
"""Of a base's sites and the stacks: what no machine holds that builds."""


def make_plan(spec: Spec, folder: Path) -> AnyPlan:
    """Plan a build.

    Args:
        folder: the spec's folder; its relative paths start there.

    Raises:
        SpecError: its slots, ranks and sizes ask for more memory than any machine has.
        BaseModelError: the base is not there, or a tensor is absent or misshapen.
        AdapterError, WeightsError: an adapter cannot be used on this base.
    """
    directories = (resolve_directory(one.path, folder, AdapterError) for one in spec.adapters)
    headers = [read_adapter(directory) for directory in directories]
    max_rank = spec.max_rank or max(header.max_rank for header in headers)
    num_slots = spec.slots or len(spec.adapters)
    layers, kind = _plan_base(spec, folder, headers, num_slots, max_rank)
    _check_bytes(spec, layers, num_slots, max_rank)
    adapters = tuple(
        _plan_adapter(spec, index, header, layers, kind.naming, num_slots)
        for index, header in enumerate(headers)
    )
    return Plan(spec, num_slots, max_rank, layers, kind, adapters, _base_source(spec.base))


def _check_bytes(spec: Spec, layers: Sequence[LayerPlan], num_slots: int, max_rank: int) -> None:
    """Raise SpecError if the weights that a build allocates are more than `_MAX_BYTES`."""
    base, lora = sum(plan.base_bytes for plan in layers), sum(plan.lora_bytes for plan in layers)
    if base + lora > _MAX_BYTES:
        message = (
            f"{num_slots} slots of rank {max_rank} at {len(layers)} layers are"
            f" {lora / 2**30:,.0f} GiB beside {base / 2**30:,.0f} GiB of the base, and a build"
            f" holds at most {_MAX_BYTES >> 30:,} GiB"
        )
        hint = "give fewer slots, a smaller max_rank or smaller layers"
        raise SpecError(spec.name, [Problem(1, "slots", message, hint)])


def _plan_base(
    spec: Spec, folder: Path, headers: Sequence[AdapterHeader], num_slots: int, max_rank: int
) -> tuple[tuple[LayerPlan, ...], PlanKind]:
    def directory(path: str) -> Path:
        return resolve_directory(path, folder, BaseModelError)

    sizes = spec, num_slots, max_rank
    match spec.base:
        case LayersSpec(path=path) as base:
            return plan_layers(base, None if path is None else directory(path), headers, *sizes)
        case TransformersSpec(path=path) as base:
            return plan_model(base, directory(path), headers, *sizes)
        case CausalLmSpec(path=path):
            return plan_decoder(directory(path), headers, *sizes)
        case OnnxSpec(path=path) as base:
            place = directory(path)
            generates = has_file(place / GENAI_CONFIG)
            layers, graph = plan_graph(base, place, generates, headers, *sizes)
            return layers, DecoderPlan(place, graph, graph.naming) if generates else graph


def _base_source(base: BaseSpec) -> str:
    """How a report names the base: as the spec does, or by the seed."""
    if base.path is None:
        return f"init seed {base.init.seed if base.init else 0}"
    return base.path


def _plan_adapter(
    spec: Spec,
    index: int,
    header: AdapterHeader,
    layers: tuple[LayerPlan, ...],
    naming: Naming,
    num_slots: int,
) -> AdapterPlan:
    adapter = spec.adapters[index]
    sites = [part.site for plan in layers for part in plan.layer.slices]
    modules = match_sites(header, sites, naming)
    check_fit(header, modules, [plan.layer for plan in layers])
    effective = {
        site: AdapterSite(
            header.modules[module].rank, header.modules[module].scaling * adapter.scale
        )
        for site, module in modules.items()
        if module in header.modules
    }
    slot = index + 1 if index < num_slots else None
    return AdapterPlan(
        adapter.name,
        adapter.path,
        adapter.scale,
        slot,
        header,
        modules,
        dict(sorted(effective.items())),
        tuple(sorted(site for site, module in modules.items() if module in header.saved)),
    )
