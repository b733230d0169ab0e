"""Where a decoder's output layer begins, and where that is not sure."""

import onnx
import onnx_ir as ir
import pytest

from loraexport.graphs.output_layer import find_output_layer

HEAD = """
<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
decoder (int64[b, n] input_ids, int64[b] adapter_ids, float[7, 4] table, float[4] g, float[4, 7] w)
    => (float[b, n, 7] logits)
<float[b, n, 4] x, float[b, n, 4] h> {
    h = Gather(table, input_ids)
    x = com.microsoft.SimplifiedLayerNormalization(h, g)
"""
PLAIN = """
    y = MatMul(x, w)
    ids = Cast<to = 1>(adapter_ids)
    own = Reshape(ids, shape)
    z = Mul(y, own)
    logits = Tanh(z)
"""


def _graph(nodes: str) -> ir.Graph:
    text = HEAD.replace("float[4, 7] w)", "float[4, 7] w, int64[3] shape)") + nodes + "}"
    graph = ir.from_proto(onnx.parser.parse_model(text)).graph
    for name in ("table", "g", "w", "shape"):  # weights
        value = next(value for value in graph.inputs if value.name == name)
        value.const_value = ir.tensor([0], name=name)
        graph.initializers.add(value)
    return graph


def test_it_begins_behind_the_last_norm() -> None:
    """What is of a row and of no token of it may join."""
    layer = find_output_layer(_graph(PLAIN), ("adapter_ids",))
    assert layer.x.name == "x"
    assert [node.op_type for node in layer.nodes] == ["MatMul", "Mul", "Tanh"]


@pytest.mark.parametrize(
    "nodes",
    [
        "logits = MatMul(h, w)",
        "y = MatMul(x, w)\n z = MatMul(h, w)\n logits = Add(y, z)",
        "y = MatMul(x, w)\n s = Shape(input_ids)\n logits = Expand(y, s)",
        """k = com.microsoft.SimplifiedLayerNormalization(x, g)
        y = MatMul(x, w)\n z = MatMul(k, w)\n logits = Add(y, z)""",
        """y = MatMul(x, w)\n yes = Constant<value_int = 1>()\n is = Cast<to = 9>(yes)
        logits = If(is) <
            then_branch = a () => (float[b, n, 7] p) { p = Identity(y) },
            else_branch = c () => (float[b, n, 7] q) { q = Neg(y) }
        >""",
    ],
    ids=["no norm", "beside it", "a shape of tokens", "two norms", "a graph"],
)
def test_where_it_is_not_sure(nodes: str) -> None:
    layer = find_output_layer(_graph(nodes), ("adapter_ids",))
    assert (layer.x.name, layer.nodes) == ("logits", ())


def test_an_input_that_is_not_told_of_is_of_tokens() -> None:
    layer = find_output_layer(_graph(PLAIN), ())
    assert (layer.x.name, layer.nodes) == ("logits", ())
