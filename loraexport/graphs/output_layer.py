"""A decoder's output layer: the nodes between its last norm and its logits, which compute each
token by itself."""

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir

_NORM = "LayerNormalization"
"""How the operators of a norm end, ONNX's own and onnxruntime's."""


@dataclass(frozen=True)
class OutputLayer:
    """x [batch, n, hidden] -> logits [batch, n, vocabulary]."""

    x: ir.Value
    nodes: tuple[ir.Node, ...]
    """All that is computed of x for the logits; other nodes may take x too."""


def find_output_layer(graph: ir.Graph, by_row: Collection[str]) -> OutputLayer:
    """The output layer of a sorted graph: if x were fewer tokens, the logits would be those of
    these. Where that is not sure, a layer without nodes, of which x is the logits.

    Args:
        by_row: names of inputs that are of a row as a whole, whatever its tokens are.
    """
    logits = next(value for value in graph.outputs if value.name == "logits")
    of_tokens = _of_tokens(graph, by_row)
    norms: set[ir.Value] = set()
    nodes: set[ir.Node] = set()
    open_values = [logits]
    while open_values:
        value = open_values.pop()
        maker = value.producer()
        if maker is None or _has_graphs(maker):
            return OutputLayer(logits, ())
        if maker.op_type.endswith(_NORM) and value is not logits:
            norms.add(value)
        elif maker not in nodes:
            nodes.add(maker)
            open_values += [one for one in maker.inputs if one in of_tokens]
    x = norms.pop() if len(norms) == 1 else logits
    if x is logits or x.shape is None or len(x.shape) != 3:
        return OutputLayer(logits, ())
    return OutputLayer(x, tuple(node for node in graph if node in nodes))


def _of_tokens(graph: ir.Graph, by_row: Collection[str]) -> set[ir.Value]:
    """What depends on the tokens, or may."""
    found = {
        value for value in graph.inputs if not (value.is_initializer() or value.name in by_row)
    }
    for node in graph:
        if any(value in found for value in node.inputs) or _has_graphs(node):
            found.update(node.outputs)
    return found


def _has_graphs(node: ir.Node) -> bool:
    """Whether it computes by graphs of its own, which see the values around it."""
    kinds = {attribute.type for attribute in node.attributes.values()}
    return ir.AttributeType.GRAPH in kinds
