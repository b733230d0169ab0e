"""`kind: transformers`: a whole Hugging Face model whose sites are multi-LoRA modules.

The sites are those of the plan; in the model each becomes one of the modules of sites.py.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraexport_runtime.adapters.dora import dora_sites, output_scales
from loraexport_runtime.adapters.packing import assemble, check_values, lowest, pack
from loraexport_runtime.adapters.sites import check_base_copies
from loraexport_runtime.adapters.tensor_files import digest_array
from loraexport_runtime.adapters.tensors import ModuleWeights, read_site_weights
from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..hf.inputs.signature import Signature
from ..hf.model import has_rotary_positions, headless_widths, load_plain_model
from ..hf.sentences.pooling import make_tail
from ..lora import STRATEGIES
from ..lora.blended import Blended
from ..lora.model_sites import ModelSite, RowContext, RowEmbedding, RowHead, RowLinear, SlicedSite
from ..lora.rows import RowBlend, RowSlots
from ..lora.strategy import LinearBase, SiteBase, StackSizes
from ..plan.model import ModelPlan
from ..plan.plan import Plan
from ..tensors import TORCH_DTYPES, to_numpy
from .adapters import put_base
from .multi_lora_model import MultiLoraModel
from .weights import Base, SiteWeights, digest_of


@dataclass(frozen=True)
class ModelModules:
    """A whole model in eager form, its stacks, and the plain model it was made of."""

    module: MultiLoraModel
    model_type: str
    """Of the config, such as `bert`."""
    layers: tuple[Layer, ...]
    signature: Signature
    blend_slots: int | None
    """The slots of adapter_weights, if rows may blend."""
    stacks: dict[str, np.ndarray] = field(repr=False)
    base_rows: dict[str, np.ndarray] = field(repr=False)
    """The base's rows by stack, for the stacks that have any."""
    output_scales: dict[str, dict[str, np.ndarray]] = field(repr=False)
    """Adapter -> site -> DoRA's g."""


def load_model_base(plan: Plan[ModelPlan]) -> tuple[Base, ModelModules]:
    """Read a planned model and its adapters, and put multi-LoRA sites into it.

    Raises:
        BaseModelError: the base cannot be used.
        WeightsError, AdapterWeightsError: an adapter cannot be used on it.
    """
    layers = [planned.layer for planned in plan.layers]
    headless = headless_widths(layers)
    model: Any = load_plain_model(plan.kind.directory, plan.kind.task, headless)
    base = read_base(model, layers, plan.kind.missing)
    dtype = plan.spec.export.dtype
    slots: dict[int, _Slot] = {}
    scales: dict[str, dict[str, np.ndarray]] = {}
    for adapter in plan.adapters:
        check_base_copies(adapter.header, adapter.modules, base.digests, plan.kind.naming)
        weights = read_site_weights(adapter.header, adapter.modules)
        dora = dora_sites(weights)
        scales[adapter.name] = output_scales(
            dora, lambda site: base.sites[site].weight, layers, adapter.scale
        )
        check_values(
            adapter.name, weights, adapter.scale, NUMPY_DTYPES[dtype], scales[adapter.name]
        )
        if adapter.slot is not None:
            slots[adapter.slot] = _Slot(weights, adapter.scale, scales[adapter.name])
    model = model.to(TORCH_DTYPES[dtype])
    blend = plan.spec.export.blend
    make_rows = partial(RowBlend, dtype=TORCH_DTYPES[dtype]) if blend else RowSlots
    context = RowContext(make_rows(plan.num_slots))
    stacks: dict[str, np.ndarray] = {}
    base_rows: dict[str, np.ndarray] = {}
    for layer in layers:
        rows = _base_rows(layer, base, NUMPY_DTYPES[dtype])
        base_rows |= rows
        blocks = {
            slot: pack(
                layer,
                content.weights,
                content.scale,
                NUMPY_DTYPES[dtype],
                rows,
                content.output_scales,
            )
            for slot, content in slots.items()
        }
        for stack in layer.stacks:
            value = assemble(stack, NUMPY_DTYPES[dtype], rows.get(stack.name), blocks)
            stacks[stack.name] = value
        _replace_sites(model, layer, plan.num_slots, context, blend)
    if model.config.model_type == "deberta-v2":
        from ..lora.row_positions import give_rows_positions

        give_rows_positions(model, context)
    tail = None if plan.kind.tail is None else make_tail(plan.kind.tail)
    if tail is not None and (tensors := tail.state_dict()):
        digests = {name: digest_array(to_numpy(tensor)) for name, tensor in tensors.items()}
        base = replace(base, digest=digest_of({"": base.digest, **digests}))
    signature = Signature(plan.kind.inputs, plan.kind.outputs)
    rotary = has_rotary_positions(model.config)
    parts = model, plan.kind.task, signature, tail, context, list(stacks), rotary
    if plan.kind.packed:
        from .unpadded import PackedModel

        module: MultiLoraModel = PackedModel(*parts).pack(plan.kind.packed)
    else:
        module = MultiLoraModel(*parts)
    return base, ModelModules(
        module.eval(),
        model.config.model_type,
        tuple(layers),
        signature,
        plan.num_slots if blend else None,
        stacks,
        base_rows,
        scales,
    )


@dataclass(frozen=True)
class _Slot:
    """What fills a slot: everything that an adapter brings, by site."""

    weights: Mapping[str, ModuleWeights]
    scale: float
    output_scales: Mapping[str, np.ndarray]


def read_base(model: nn.Module, layers: Sequence[Layer], missing: Sequence[str]) -> Base:
    """The frozen weights of every site, [out, in], and the digest of all that its files have.

    Args:
        missing: the weights that they lack.
    """
    sites = {}
    for layer in layers:
        for part in layer.slices:
            module: Any = model.get_submodule(part.site)
            bias = getattr(module, "bias", None)
            weight = to_numpy(_weight(module))
            sites[part.site] = SiteWeights(weight, None if bias is None else to_numpy(bias))
    return replace(digest_base(model, layers, missing), sites=sites)


def digest_base(model: nn.Module, layers: Sequence[Layer], missing: Sequence[str]) -> Base:
    """The digests of a model's weights as float32, in whatever dtype they are.

    Args:
        missing: the weights that its files lack.
    """
    every = {
        name: digest_array(to_numpy(tensor.float() if tensor.is_floating_point() else tensor))
        for name, tensor in model.state_dict().items()
        if name not in missing
    }
    sites = [part.site for layer in layers for part in layer.slices]
    digests = {site: digest_array(stored_weight(model, site)) for site in sites}
    digests |= {
        name: every[f"{name}.weight"]
        for name in _embeddings(model)
        if name not in sites and f"{name}.weight" in every
    }
    return Base({}, digests, digest_of(every), tuple(missing))


def _embeddings(model: Any) -> list[str]:
    """The modules whose weights PEFT may save beside a LoRA: the first and the output layer."""
    getters = ("get_input_embeddings", "get_output_embeddings")
    layers = []
    for getter in getters:
        with suppress(AttributeError, NotImplementedError):  # a model of sounds has none
            layers.append(getattr(model, getter)())
    return [
        name for name, module in model.named_modules() if any(module is layer for layer in layers)
    ]


def _base_rows(layer: Layer, base: Base, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What stands ahead of the slots in each stack: W^T, or the base's own parameter."""
    rows = {}
    for stack in layer.stacks:
        if stack.row_offset:
            value = np.zeros((stack.row_offset, stack.shape[1]))
            if stack.role == "output_scale":
                value[:] = 1
            for part in layer.slices:
                weights = base.sites[part.site]
                columns = slice(part.offset, part.offset + part.width)
                if stack.role == "lora_B":
                    column = part.offset - stack.column_offset
                    if 0 <= column < stack.shape[1]:
                        put_base(
                            value[:, column : column + part.width], weights.weight, weights.bias
                        )
                elif stack.role == "weight":
                    value[: len(weights.weight)] = weights.weight
                elif stack.role == "bias":
                    # Labels that the base lacks, as in stacks.pack.
                    value[:, columns] = lowest(dtype)
                    base_columns = slice(part.offset, part.offset + len(weights.weight))
                    value[:, base_columns] = 0 if weights.bias is None else weights.bias
            rows[stack.name] = value.astype(dtype)
    return rows


def _replace_sites(
    model: Any, layer: Layer, num_slots: int, context: RowContext, blend: bool
) -> None:
    """Put a ModelSite in a linear layer's place, or a SlicedSite in the place of each."""
    modules: list[Any] = [model.get_submodule(part.site) for part in layer.slices]
    weight = torch.cat([_weight(module) for module in modules])
    biases = [getattr(module, "bias", None) for module in modules]
    bias = None
    if any(bias is not None for bias in biases):
        pieces = [
            weight.new_zeros(len(_weight(module))) if bias is None else bias.detach()
            for module, bias in zip(modules, biases, strict=True)
        ]
        bias = torch.cat(pieces)
    roles = {stack.role for stack in layer.stacks}
    base: SiteBase
    biases_behind: Sequence[Tensor] = ()
    if "weight" in roles:
        base = RowHead(weight, bias, layer, context)
    elif layer.kind == "embedding":
        base = RowEmbedding(weight, None, layer, context)
    elif roles & {"output_scale", "bias"}:
        base = RowLinear(weight, bias, layer, context)
    else:
        bs = [stack for stack in layer.stacks if stack.role == "lora_B"]
        base = LinearBase(None if bs[0].row_offset else weight, None)
        if bias is not None and bs[0].row_offset <= layer.in_features:
            biases_behind = torch.split(bias, [stack.shape[1] for stack in bs])
    lora = None
    if "lora_A" in roles:
        make = Blended if blend else STRATEGIES[layer.strategy]
        lora = make(StackSizes.of(layer, num_slots, weight.dtype))
    factor = float(getattr(modules[0], "embed_scale", 1.0))
    whole = ModelSite(base, lora, layer, context, factor, biases_behind)
    for index, part in enumerate(layer.slices):
        parent, _, child = part.site.rpartition(".")
        sliced = SlicedSite(whole, index, context)
        setattr(model.get_submodule(parent), child, whole if len(layer.slices) == 1 else sliced)


def stored_weight(model: nn.Module, site: str) -> np.ndarray:
    """float32 [out, in] of a site; an embedding's [vocabulary, dim]."""
    return to_numpy(_weight(model.get_submodule(site)).float())


def _weight(module: Any) -> Tensor:
    """[out, in] whatever the module stores; an embedding's [vocabulary, dim]."""
    weight: Tensor = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight
