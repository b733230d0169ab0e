"""Spec + file headers -> a frozen Plan: layers, ranks, slots, strategy and why, bytes and FLOPs.

No tensor data, and for layers no torch: it takes well under two seconds. A whole model is built on
the meta device to see its sites, which imports transformers.
"""

from dataclasses import dataclass, field
from pathlib import Path

from loraexport_runtime.adapters.fit import check_fit
from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.manifest import AdapterSite
from loraexport_runtime.errors import AdapterError

from ..errors import BaseModelError
from ..hf.checkpoint import read_checkpoint
from ..hf.sources import resolve_directory
from ..spec.schema import Spec
from .decoder import GeneratorPlan, plan_decoder
from .graph import GraphPlan, plan_onnx
from .layer import LayerPlan, refuse_features
from .layers import plan_layer
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


@dataclass(frozen=True)
class Plan:
    """Everything that a build needs to know before it reads a weight."""

    spec: Spec
    num_slots: int
    max_rank: int
    layers: tuple[LayerPlan, ...]
    """The graphs of `kind: layers`, or the sites of a whole model's one graph."""
    model: ModelPlan | None
    generator: GeneratorPlan | None
    graph: GraphPlan | None
    adapters: tuple[AdapterPlan, ...]
    base_source: str
    seed: int
    """Of synthetic weights; 0 where there are none."""


def make_plan(spec: Spec, folder: Path) -> Plan:
    """Plan a build.

    Args:
        folder: the spec's folder; its relative paths start there.

    Raises:
        BaseModelError: the base is not there, or a tensor is absent or misshapen.
        AdapterError, WeightsError: an adapter cannot be used on this base.
    """
    headers = [
        read_adapter(resolve_directory(adapter.path, folder, AdapterError))
        for adapter in spec.adapters
    ]
    max_rank = spec.max_rank or max(header.max_rank for header in headers)
    num_slots = spec.slots or len(spec.adapters)
    base, directory = spec.base, None
    model, generator, graph = None, None, None
    if base.path is not None:
        directory = resolve_directory(base.path, folder, BaseModelError)
    if base.kind == "transformers":
        assert directory is not None, "a whole model has a path"
        layers, model = plan_model(base, directory, headers, spec, num_slots, max_rank)
    elif base.kind == "causal_lm":
        assert directory is not None, "a decoder has a path"
        layers, generator = plan_decoder(directory, headers, spec, num_slots, max_rank)
    elif base.kind == "onnx":
        assert directory is not None, "a graph has a path"
        layers, graph = plan_onnx(base, directory, headers, spec, num_slots, max_rank)
    else:
        tensors = read_checkpoint(directory) if directory else None
        layers = tuple(
            plan_layer(layer, tensors, spec, num_slots, max_rank) for layer in base.layers
        )
        _check_sites_differ(layers)
        instead = "build the whole model (base.kind: transformers)"
        refuse_features(headers, "the graph of a single layer", instead)
    adapters = tuple(
        _plan_adapter(spec, index, header, layers, num_slots)
        for index, header in enumerate(headers)
    )
    seed = base.init.seed if base.kind == "layers" and base.init else 0
    source = base.path or f"init seed {seed}"
    return Plan(spec, num_slots, max_rank, layers, model, generator, graph, adapters, source, seed)


def _check_sites_differ(layers: tuple[LayerPlan, ...]) -> None:
    seen: dict[str, str] = {}
    for plan in layers:
        for part in plan.layer.slices:
            if seen.get(part.site) == plan.layer.name:
                raise BaseModelError(
                    f"site {part.site!r} is twice in layer {plan.layer.name!r}; give each slice its"
                    " own site"
                )
            if part.site in seen:
                raise BaseModelError(
                    f"site {part.site!r} is in layer {seen[part.site]!r} and in"
                    f" {plan.layer.name!r}; a site belongs to one layer"
                )
            seen[part.site] = plan.layer.name


def _plan_adapter(
    spec: Spec,
    index: int,
    header: AdapterHeader,
    layers: tuple[LayerPlan, ...],
    num_slots: int,
) -> AdapterPlan:
    adapter = spec.adapters[index]
    sites = [part.site for plan in layers for part in plan.layer.slices]
    modules = match_sites(header, sites)
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
