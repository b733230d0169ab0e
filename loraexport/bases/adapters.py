"""The adapters of a build, read from their directories and packed into the stacks."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from loraexport_runtime.adapters.packing import assemble, pack
from loraexport_runtime.adapters.sites import check_base_copies
from loraexport_runtime.adapters.tensors import LoraWeights, read_lora_weights
from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..plan.plan import AnyPlan
from .weights import Base

AdapterWeights = Mapping[str, LoraWeights]
"""One adapter's weights by site."""


def load_adapters(plan: AnyPlan, base: Base) -> dict[str, AdapterWeights]:
    """Read the weights of a plan's adapters, by adapter name.

    Raises:
        WeightsError: a tensor holds NaN or Inf.
        AdapterWeightsError: an adapter carries another base's embedding.
    """
    loaded: dict[str, AdapterWeights] = {}
    for adapter in plan.adapters:
        check_base_copies(adapter.header, adapter.modules, base.digests)
        tensors = read_lora_weights(adapter.header)
        loaded[adapter.name] = {site: tensors[module] for site, module in adapter.modules.items()}
    return loaded


def pack_adapters(plan: AnyPlan, base: Base, layers: Iterable[Layer]) -> dict[str, np.ndarray]:
    """The slots' rows of every stack that a graft brings, by name; the base's are in its graph.

    Args:
        layers: the plan's, with the stacks that fit the graph.

    Raises:
        WeightsError, AdapterWeightsError: see `load_adapters`.
    """
    adapters = load_adapters(plan, base)
    dtype = NUMPY_DTYPES[plan.spec.export.dtype]
    stacks: dict[str, np.ndarray] = {}
    for layer in layers:
        blocks = {}
        for adapter in plan.adapters:
            if adapter.slot is not None:
                packed = pack(layer, adapters[adapter.name], adapter.scale, dtype)
                if layer.stacks[0].slot_rows is not None:
                    ranks = {site: found.rank for site, found in adapter.sites.items()}
                    packed = _cut(packed, layer, ranks, layer.stacks[0].slot_rows[adapter.slot - 1])
                blocks[adapter.slot] = packed
        for stack in layer.stacks:
            rows = (stack.shape[0] - stack.row_offset, stack.shape[1])
            own = replace(stack, shape=rows, row_offset=0)
            stacks[stack.name] = assemble(own, dtype, None, blocks)
    return stacks


def _cut(
    packed: Mapping[str, np.ndarray], layer: Layer, ranks: Mapping[str, int], rows: int
) -> dict[str, np.ndarray]:
    """A slot's blocks with the rows that its adapter has alone, and zeros up to `rows`."""
    used = [
        index * layer.max_rank + row
        for index, part in enumerate(layer.slices)
        for row in range(ranks.get(part.site, 0))
    ]
    fill = ((0, rows - len(used)), (0, 0))
    return {name: np.pad(block[used], fill) for name, block in packed.items()}


def put_base(rows: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> None:
    """Write how an augmented stack begins: W^T, and the bias below it where `rows` has room.

    Args:
        rows: zeros [in, out], or [in + BIAS_ROWS, out].
        weight: [out, in].
    """
    size_in = weight.shape[1]
    rows[:size_in] = weight.T
    if bias is not None and len(rows) > size_in:
        rows[size_in] = bias
