"""The stack of a layer's ranks: how many of its slot's rows an adapter has, for kernels."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from loraexport_runtime.contract.manifest import Layer, Stack


def rank_stack(layer: Layer, num_slots: int) -> Stack:
    """It lies beside the layer's lora_A and lora_B where the graph calls a function for them."""
    return Stack(f"{layer.name}.rank", "rank", (num_slots, 1), 1, 0, 0)


def add_ranks(
    graph: ir.Graph, layer: Layer, num_slots: int, initial: Mapping[str, np.ndarray]
) -> ir.Value:
    """The graph's new input of a layer's ranks, with its initial value: of each slot the number of
    rows up to its last one that is not zero.

    Args:
        initial: the values of the stacks of role lora_A, by name, or of their slots' rows alone.
    """
    a, stack = layer.stack("lora_A"), rank_stack(layer, num_slots)
    assert a is not None, "what has a function has LoRA"
    of_slots = initial[a.name][-num_slots * a.rows_per_slot :]
    is_used = of_slots.astype(bool).any(axis=1).reshape(num_slots, a.rows_per_slot)
    ranks = (is_used * np.arange(1, 1 + a.rows_per_slot)).max(axis=1).reshape(stack.shape)
    value = ir.Value(
        name=stack.name,
        shape=ir.Shape(stack.shape),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.Tensor(ranks, name=stack.name),
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
