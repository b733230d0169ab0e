"""onnxruntime's own fused operators, where torch's exporter writes ONNX's standard ones.

Attention of [batch, heads, n, size] with a bool mask becomes MultiHeadAttention of
[batch, n, heads * size] with the mask as an addend: no transposes, and on CUDA a flash kernel,
where the other makes the mask an addend anew in every layer; the biases of q, k and v go into it
where each was added before. A mask that is one for all queries, which onnxruntime's Attention does
not take, is repeated for each. Gelu becomes BiasGelu, whose kernel is vectorized, with the bias
that was added before it or zeros. Both are float32's and float16's alone.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

DOMAIN = "com.microsoft"
_MASKED = -10000.0
"""What a masked score gets, as onnxruntime has it: exp of it is 0, and a sum in float16 finite."""
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def fuse(model: ir.Model) -> None:
    """Replace what can be, in place; what has another form stays as it is."""
    graph = model.graph
    masks: dict[ir.Value, ir.Value] = {}
    repeated: dict[ir.Value, ir.Value] = {}
    zeros: dict[tuple[ir.DataType, int], ir.Value] = {}
    for node in list(graph):
        if node.op_type == "Attention" and node.domain == "":
            _repeat_mask(graph, node, repeated)
            _fuse_attention(graph, node, masks)
        elif node.op_type == "Gelu" and node.domain == "":
            _fuse_gelu(graph, node, zeros)
    if any(node.domain == DOMAIN for node in graph):
        model.opset_imports[DOMAIN] = 1
        RemoveUnusedNodesPass()(model)


def _repeat_mask(graph: ir.Graph, node: ir.Node, repeated: dict[ir.Value, ir.Value]) -> None:
    """Make a mask [batch, 1, 1, n] one of [batch, 1, queries, n]."""
    query, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    if query is None or mask is None or mask.shape is None or len(mask.shape) != 4:
        return
    if mask.shape[2] != 1 or query.shape is None or query.shape[2] == 1:
        return
    if mask not in repeated:
        one = ir.Value(
            name=f"attention/one/{len(graph.initializers)}",
            const_value=ir.tensor(np.ones(1, np.int64)),
        )
        graph.initializers.add(one)
        queries = ir.node("Shape", [query], {"start": 2, "end": 3})
        sizes = ir.node("Concat", [one, one, queries.outputs[0], one], {"axis": 0})
        wide = ir.node("Expand", [mask, sizes.outputs[0]])
        wide.outputs[0].type = mask.type
        wide.outputs[0].shape = ir.Shape([*mask.shape[:2], query.shape[2], mask.shape[3]])
        graph.insert_before(node, [queries, sizes, wide])
        repeated[mask] = wide.outputs[0]
    node.replace_input_with(3, repeated[mask])


def _fuse_attention(graph: ir.Graph, node: ir.Node, masks: dict[ir.Value, ir.Value]) -> None:
    whole = _joined_heads(node)
    query, mask = node.inputs[0], node.inputs[3] if len(node.inputs) > 3 else None
    if whole is None or query is None or query.dtype not in _DTYPES:
        return
    inputs = [_before_heads(graph, node, value) for value in node.inputs[:3]]
    x = [value for value in inputs if value is not None]
    if len(x) < len(inputs):
        return
    if mask is not None:
        if mask.dtype != ir.DataType.BOOL or mask.shape is None or len(mask.shape) != 4:
            return
        if mask not in masks:
            masks[mask] = _make_addend(graph, node, mask, query.dtype)
    attributes: dict[str, int | float] = {"num_heads": _heads(node), "mask_filter_value": _MASKED}
    if "scale" in node.attributes:
        attributes["scale"] = node.attributes["scale"].as_float()
    addend = masks[mask] if mask is not None else None
    fused = _node("MultiHeadAttention", [*_take_biases(graph, x), None, addend], attributes, node)
    graph.insert_after(node, fused)
    _replace(whole, fused.outputs[0])


def _take_biases(graph: ir.Graph, x: Sequence[ir.Value]) -> list[ir.Value | None]:
    """Query, key, value, and a bias of all: theirs, if each was added before; else None."""
    apart = [_added_bias(value) for value in x]
    biases = [bias.const_value.numpy() for _, bias in apart if bias and bias.const_value]
    if len(biases) < len(x):
        return [*x, None]
    name = f"attention/bias/{len(graph.initializers)}"
    joined = ir.Value(name=name, const_value=ir.tensor(np.concatenate(biases)))
    graph.initializers.add(joined)
    return [*(plain for plain, _ in apart), joined]


def _joined_heads(node: ir.Node) -> ir.Value | None:
    """What takes the place of an Attention's output once its heads are side by side.

    None, if it does more than a mask and a scale, or its output is used in another way.
    """
    attributes = [node.attributes.get(name) for name in ("is_causal", "softcap")]
    more = any(attribute is not None and attribute.value for attribute in attributes)
    users = [user for user, _ in node.outputs[0].uses()]
    if more or len(node.inputs) > 4 or len(node.outputs) > 1 or len(users) != 1:
        return None
    same_heads = len({str(value.shape[1]) for value in node.inputs[:3] if value and value.shape})
    return users[0].outputs[0] if _swaps_heads(users[0]) and same_heads == 1 else None


def _before_heads(graph: ir.Graph, node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """x [batch, n, heads * size] of Transpose([batch, n, heads, size]); None for another form."""
    transpose = value.producer() if value is not None else None
    if value is None or value.shape is None or transpose is None or not _swaps_heads(transpose):
        return None
    apart, heads, size = transpose.inputs[0], value.shape[1], value.shape[3]
    if apart is None or not isinstance(heads, int) or not isinstance(size, int):
        return None
    reshape = apart.producer()
    x = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    if x is not None and x.shape is not None and len(x.shape) == 3:
        return x if x.shape[2] == heads * size else None
    name = f"attention/joined/{heads * size}"
    if name not in graph.initializers:
        sizes = ir.tensor(np.array([0, 0, heads * size], np.int64))  # 0: as it is
        graph.initializers.add(ir.Value(name=name, const_value=sizes))
    joined = ir.node("Reshape", [apart, graph.initializers[name]])
    graph.insert_before(node, joined)
    return joined.outputs[0]


def _swaps_heads(node: ir.Node) -> bool:
    """Between [batch, n, heads, size] and [batch, heads, n, size]."""
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and perm is not None and [*perm.as_ints()] == [0, 2, 1, 3]


def _heads(node: ir.Node) -> int:
    query = node.inputs[0]
    assert query is not None, "an Attention has a query"
    assert query.shape is not None, "it was looked at"
    return int(query.shape[1])  # type: ignore[arg-type]


def _make_addend(
    graph: ir.Graph, node: ir.Node, mask: ir.Value, dtype: ir.DataType | None
) -> ir.Value:
    """0 where the mask is true, else a number so low that its softmax is 0."""
    ends = []
    for name, number in (("shown", 0.0), ("masked", _MASKED)):
        array = np.array(number, np.float16 if dtype == ir.DataType.FLOAT16 else np.float32)
        ends.append(ir.Value(name=f"attention/{name}", const_value=ir.tensor(array)))
        graph.initializers.add(ends[-1])
    addend = ir.node("Where", [mask, *ends])
    graph.insert_before(node, addend)
    return addend.outputs[0]


def _fuse_gelu(
    graph: ir.Graph, node: ir.Node, zeros: dict[tuple[ir.DataType, int], ir.Value]
) -> None:
    x, approximate = node.inputs[0], node.attributes.get("approximate")
    if x is None or x.shape is None or x.dtype not in _DTYPES:
        return
    if approximate is not None and approximate.as_string() != "none":
        return
    width = x.shape[-1]
    if not isinstance(width, int):
        return
    assert x.dtype is not None, "it is one of two"
    plain, bias = _added_bias(x)
    if bias is None:
        if (x.dtype, width) not in zeros:
            array = np.zeros(width, x.dtype.numpy())
            zeros[x.dtype, width] = ir.Value(name=f"gelu/{width}", const_value=ir.tensor(array))
            graph.initializers.add(zeros[x.dtype, width])
        bias = zeros[x.dtype, width]
    fused = _node("BiasGelu", [plain, bias], {}, node)
    graph.insert_after(node, fused)
    _replace(node.outputs[0], fused.outputs[0])


def _added_bias(x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """(y, b), where x is y + b for an initializer b [width of y], nothing else; else (x, None)."""
    add = x.producer()
    if add is None or add.op_type != "Add" or add.domain != "" or len(x.uses()) != 1:
        return x, None
    for y, bias in (add.inputs, add.inputs[::-1]):
        assert y is not None, "an Add has two inputs"
        assert bias is not None, "an Add has two inputs"
        is_constant = bias.is_initializer() and not bias.is_graph_input()
        if is_constant and y.shape and y.shape == x.shape and bias.shape == y.shape[-1:]:
            return y, bias
    return x, None


def _replace(old: ir.Value, new: ir.Value) -> None:
    new.type = old.type
    for user, index in list(old.uses()):
        user.replace_input_with(index, new)


def _node(
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, int | float],
    old: ir.Node,
) -> ir.Node:
    node = ir.node(kind, inputs, attributes, domain=DOMAIN)
    node.metadata_props.update(old.metadata_props)  # it says which module the node is of
    return node
