"""The adapters of a build, read from their directories and packed into the stacks."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from loraexport_runtime.adapters.packing import assemble, check_values, pack
from loraexport_runtime.adapters.sites import check_base_copies
from loraexport_runtime.adapters.tensors import ModuleWeights, read_site_weights
from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..plan.plan import AnyPlan
from .weights import Base

AdapterWeights = Mapping[str, ModuleWeights]
"""One adapter's weights by site."""
OutputScales = Mapping[str, Mapping[str, np.ndarray]]
"""Adapter -> site -> DoRA's g."""


def load_adapters(
    plan: AnyPlan, base: Base, output_scales: OutputScales | None = None
) -> dict[str, AdapterWeights]:
    """Read the weights of a plan's adapters, by adapter name.

    Raises:
        WeightsError: a tensor holds NaN or Inf.
        AdapterWeightsError: an adapter carries another base's embedding, or a value that overflows
            the export's dtype.
    """
    dtype = NUMPY_DTYPES[plan.spec.export.dtype]
    loaded: dict[str, AdapterWeights] = {}
    for adapter in plan.adapters:
        check_base_copies(adapter.header, adapter.modules, base.digests, plan.kind.naming)
        weights = read_site_weights(adapter.header, adapter.modules)
        scales = dict((output_scales or {}).get(adapter.name, {}))
        check_values(adapter.name, weights, adapter.scale, dtype, scales)
        loaded[adapter.name] = weights
    return loaded


def pack_adapters(
    plan: AnyPlan,
    base: Base,
    layers: Iterable[Layer],
    base_rows: Mapping[str, np.ndarray] | None = None,
    output_scales: OutputScales | None = None,
) -> dict[str, np.ndarray]:
    """The rows of every stack that a graft brings, by name: of the slots, and ahead of them the
    base's where they are parameters; other rows of the base are in its graph.

    Args:
        layers: the plan's, with the stacks that fit the graph.
        base_rows: of the stacks that replace a parameter of the base, by name.

    Raises:
        WeightsError, AdapterWeightsError: see `load_adapters`.
    """
    base_rows, output_scales = base_rows or {}, output_scales or {}
    adapters = load_adapters(plan, base, output_scales)
    dtype = NUMPY_DTYPES[plan.spec.export.dtype]
    stacks: dict[str, np.ndarray] = {}
    for layer in layers:
        blocks = {}
        for adapter in plan.adapters:
            if adapter.slot is not None:
                scales = output_scales.get(adapter.name)
                weights = adapters[adapter.name]
                packed = pack(layer, weights, adapter.scale, dtype, base_rows, scales)
                blocks[adapter.slot] = packed
        for stack in layer.stacks:
            if stack.name in base_rows:
                stacks[stack.name] = assemble(stack, dtype, base_rows[stack.name], blocks)
                continue
            rows = (stack.shape[0] - stack.row_offset, stack.shape[1])
            slot_stack = replace(stack, shape=rows, row_offset=0)
            stacks[stack.name] = assemble(slot_stack, dtype, None, blocks)
    return stacks


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
