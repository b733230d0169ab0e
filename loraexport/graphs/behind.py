"""What uses a node's output in an ONNX graph: a bias that is added, and who gets another value."""

from collections.abc import Collection

import onnx_ir as ir


def bias_behind(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of a bias [out] that follows a product, and the bias; None: the product has none."""
    uses = list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0][0].op_type != "Add":
        return None
    add, index = uses[0]
    bias = add.inputs[1 - index]
    if bias is None or not bias.is_initializer() or bias.shape is None or len(bias.shape) != 1:
        return None
    return add, bias


def take_place(graph: ir.Graph, old: ir.Value, new: ir.Value, makers: Collection[ir.Node]) -> None:
    """Every use of `old` takes `new`, but for those that make it; so does the graph's output."""
    new.shape, new.type = old.shape, old.type
    for user, index in list(old.uses()):
        if user not in makers:
            user.replace_input_with(index, new)
    for index, output in enumerate(graph.outputs):
        if output is old:
            new.name, old.name = old.name, f"{old.name}_base"
            graph.outputs[index] = new
