"""`kind: layers`: the planned layers' weights, from a checkpoint or a seed, and their modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from loraexport_runtime.adapters.packing import assemble, pack
from loraexport_runtime.adapters.tensor_files import digest_array, read_tensors
from loraexport_runtime.adapters.tensors import LoraWeights
from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..errors import BaseModelError
from ..lora import STRATEGIES
from ..lora.layer import MultiLoraEmbedding, MultiLoraLinear
from ..lora.segmented import SegmentedLayer, SegmentedLoop
from ..lora.strategy import EmbeddingBase, LinearBase, StackSizes
from ..plan.layer import LayerPlan, SiteSource
from ..plan.layers import LayersPlan
from ..plan.plan import Plan
from ..tensors import TORCH_DTYPES, to_torch
from .adapters import AdapterWeights, put_base
from .weights import Base, SiteWeights, digest_of


def load_layers_base(plan: Plan[LayersPlan]) -> Base:
    """Read the weights of a plan's layers.

    Raises:
        WeightsError: a tensor holds NaN or Inf.
        BaseModelError: a value does not fit into the export's dtype.
    """
    sites: dict[str, SiteWeights] = {}
    for index, layer_plan in enumerate(plan.layers):
        for part, source in zip(layer_plan.layer.slices, layer_plan.sources, strict=True):
            if source.weight is None:
                generator = np.random.default_rng([plan.kind.seed, index, part.offset])
                weights = _draw(generator, layer_plan, part.width, source.has_bias)
            else:
                weights = _read(source, layer_plan.fan_in_fan_out)
            _check_fits(weights, part.site, plan.spec.export.dtype)
            sites[part.site] = weights
    digests = {site: digest_array(weights.weight) for site, weights in sites.items()}
    biases = {f"{site}.bias": weights.bias for site, weights in sites.items()}
    every = digests | {
        name: digest_array(bias) for name, bias in biases.items() if bias is not None
    }
    return Base(sites, digests, digest_of(every))


def _read(source: SiteSource, fan_in_fan_out: bool) -> SiteWeights:
    assert source.weight is not None, "only sources with tensors are read"
    infos = [source.weight] + ([source.bias] if source.bias else [])
    arrays = read_tensors(infos)
    weight = arrays[source.weight[0]]
    bias = arrays[source.bias[0]] if source.bias else None
    return SiteWeights(np.ascontiguousarray(weight.T) if fan_in_fan_out else weight, bias)


def _draw(
    generator: np.random.Generator, plan: LayerPlan, width: int, has_bias: bool
) -> SiteWeights:
    """Normal with variance 1 / in_features; for an embedding with variance 1."""
    size = plan.layer.in_features
    is_embedding = plan.layer.kind == "embedding"
    shape = (size, width) if is_embedding else (width, size)
    weight = generator.standard_normal(shape, np.float32)
    if not is_embedding:
        weight /= np.float32(np.sqrt(size))
    bias = generator.standard_normal(width, np.float32) if has_bias else None
    return SiteWeights(weight, bias)


def _check_fits(weights: SiteWeights, site: str, dtype: str) -> None:
    for name, array in (("weight", weights.weight), ("bias", weights.bias)):
        if array is None:
            continue
        with np.errstate(over="ignore"):
            fits = np.isfinite(array.astype(NUMPY_DTYPES[dtype])).all()
        if not fits:
            raise BaseModelError(
                f"site {site!r}: its {name} overflows {dtype}; export in bfloat16 or float32"
            )


@dataclass(frozen=True)
class LayerModules:
    """One layer in its two eager forms, which the exporters trace."""

    layer: Layer
    segmented: SegmentedLayer
    """The seed's loop, for TorchScript."""
    stacked: MultiLoraLinear | MultiLoraEmbedding
    """The plan's strategy over stacks, for ONNX."""
    stacks: dict[str, np.ndarray]
    """The initial value of every stack, by name."""
    base_rows: dict[str, np.ndarray]
    """The base's part of each stack that has one, by stack name."""


def build_modules(
    plan: Plan[LayersPlan], base: Base, adapters: Mapping[str, AdapterWeights]
) -> tuple[LayerModules, ...]:
    """The eager modules of every planned layer, in evaluation mode and the export's dtype."""
    slots = {
        adapter.slot: (adapters[adapter.name], adapter.scale)
        for adapter in plan.adapters
        if adapter.slot is not None
    }
    return tuple(_build(layer.layer, base, slots, plan) for layer in plan.layers)


def _build(
    layer: Layer,
    base: Base,
    slots: Mapping[int, tuple[AdapterWeights, float]],
    plan: Plan[LayersPlan],
) -> LayerModules:
    dtype = NUMPY_DTYPES[plan.spec.export.dtype]
    weight, bias = _fuse([base.sites[part.site] for part in layer.slices], layer, dtype)
    blocks = {slot: pack(layer, weights, scale, dtype) for slot, (weights, scale) in slots.items()}
    base_rows = {}
    for stack in layer.stacks:
        if stack.row_offset:
            ahead = np.zeros((stack.row_offset, stack.shape[1]), dtype)
            if stack.role == "lora_B":
                put_base(ahead, weight, bias)
            base_rows[stack.name] = ahead
    stacks = {
        stack.name: assemble(stack, dtype, base_rows.get(stack.name), blocks)
        for stack in layer.stacks
    }
    torch_dtype = TORCH_DTYPES[plan.spec.export.dtype]
    strategy = STRATEGIES[layer.strategy](StackSizes.of(layer, plan.num_slots, torch_dtype))
    make_base = EmbeddingBase if layer.kind == "embedding" else LinearBase
    torch_bias = None if bias is None else to_torch(bias)
    whole_base = make_base(to_torch(weight), torch_bias)
    stacked_base = make_base(None, None) if base_rows else whole_base
    make_layer = MultiLoraEmbedding if layer.kind == "embedding" else MultiLoraLinear
    # Layers have no modules that were trained whole: their plan refuses these.
    lora_slots = cast("Mapping[int, tuple[Mapping[str, LoraWeights], float]]", slots)
    loop = SegmentedLoop(layer, lora_slots, plan.num_slots, dtype)
    return LayerModules(
        layer,
        SegmentedLayer(whole_base, loop).eval(),
        make_layer(stacked_base, strategy).eval(),
        stacks,
        base_rows,
    )


def _fuse(
    parts: list[SiteWeights], layer: Layer, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray | None]:
    """The slices' weights as one [out, in] (or [vocabulary, dim]), and their biases as one."""
    weight = np.concatenate([part.weight for part in parts]).astype(dtype)
    if all(part.bias is None for part in parts):
        return weight, None
    biases = [
        np.zeros(part.width, dtype) if weights.bias is None else weights.bias.astype(dtype)
        for weights, part in zip(parts, layer.slices, strict=True)
    ]
    return weight, np.concatenate(biases)
