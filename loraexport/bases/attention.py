"""Attention in a decoder's graph, made right at every length and for every row by itself.

Takes a graph of onnxruntime-genai's model builder: its GroupQueryAttention nodes, and the rotary
factors that they read. Gives windows where the model has them, a cache of full length in every
layer, transformers' own rotary factors, and of longrope those that each row's length asks for.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from loraexport_runtime.generation.rope import READ_LENGTHS

from ..errors import BaseModelError
from ..hf.positions import Positions, RotaryFactors

_ATTENTION = "GroupQueryAttention"
_LENGTHS, _TOTAL, _COS, _SIN, _NORM = 5, 6, 7, 8, 14
"""Inputs of GroupQueryAttention: lengths - 1 of the rows, the longest, both caches, norms of q."""


@dataclass(frozen=True)
class RotaryTables:
    """Rotary factors of texts up to a length, and of longer ones."""

    short: RotaryFactors
    long: RotaryFactors | None
    """None: every text has the same."""


def keep_whole_caches(model: ir.Model) -> None:
    """Let every layer's keys and values be as long as the others', also where a window sees few.

    onnxruntime-genai alone runs layers whose cache is a ring; the window itself stays.
    """
    graph = model.graph
    for node in _attentions(graph):
        node.attributes.pop("sliding_window_cache", None)
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            names = [str(size).replace("sliding", "sequence") for size in value.shape]
            sizes = zip(names, value.shape, strict=True)
            value.shape = ir.Shape(
                [size if isinstance(size, int) else name for name, size in sizes]
            )


def set_layers(model: ir.Model, positions: Positions) -> None:
    """Write every layer's window, which the builder leaves out of some models, and which layers
    turn q and k.

    Raises:
        BaseModelError: the graph has another number of layers.
    """
    nodes = list(_attentions(model.graph))
    if len(nodes) != len(positions.windows):
        raise BaseModelError(
            f"the graph has {len(nodes)} {_ATTENTION} nodes, and the model"
            f" {len(positions.windows)} layers, so that its windows have no place"
        )
    for index, (node, window) in enumerate(zip(nodes, positions.windows, strict=True)):
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window or -1)
        if index in positions.plain:
            _leave_plain(node)


def graph_positions(model: ir.Model) -> Positions:
    """Windows and lengths of a graph that exists, as it says itself."""
    windows = [
        node.attributes.get_int("local_window_size", -1) for node in _attentions(model.graph)
    ]
    choice = _find_choice(model.graph)
    length = None if choice is None else choice.tables.short.cos.shape[0]
    return Positions(tuple(window if window > 0 else None for window in windows), length)


def set_factors(model: ir.Model, tables: RotaryTables, head_size: int) -> None:
    """Put transformers' rotary factors in the place of the builder's.

    Raises:
        BaseModelError: the graph's are of another size.
    """
    for node in _rotating(model.graph):
        for index, values in ((_COS, tables.short.cos), (_SIN, tables.short.sin)):
            old = node.inputs[index]
            if (
                old is None
                or old.const_value is None
                or old.const_value.shape[1] != values.shape[1]
            ):
                raise BaseModelError(
                    f"the graph's node {node.name!r} turns another number of values than the"
                    " model's rotary positions"
                )
            _fill(old, values)
    if tables.long is not None:
        _choose_by_row(model.graph, tables, head_size)


def choose_by_row(model: ir.Model, head_size: int) -> None:
    """Of a graph that exists, whose factors are one choice for a whole batch (longrope)."""
    choice = _find_choice(model.graph)
    if choice is None:
        return
    _choose_by_row(model.graph, choice.tables, head_size)
    model.graph.remove(choice.node, safe=True)


@dataclass(frozen=True)
class _Choice:
    node: ir.Node
    tables: RotaryTables


def _find_choice(graph: ir.Graph) -> _Choice | None:
    """The If node that gives all rows of a batch the factors of its longest text."""
    for node in _rotating(graph):
        producer = _input(node, _COS).producer()
        if producer is None or producer.op_type != "If":
            continue
        short, long = (
            RotaryFactors(
                *(_constant(value) for value in producer.attributes[branch].as_graph().outputs)
            )
            for branch in ("else_branch", "then_branch")
        )
        return _Choice(producer, RotaryTables(short, long))
    return None


def _constant(value: ir.Value) -> np.ndarray:
    node = value.producer()
    assert node is not None, "a branch gives a constant"
    tensor = node.attributes["value"].as_tensor()
    return tensor.numpy()


def _fill(value: ir.Value, values: np.ndarray) -> None:
    filled = ir.tensor(values.astype(_tensor(value).dtype.numpy()), name=value.name)
    value.const_value, value.shape = filled, ir.Shape(values.shape)


def _choose_by_row(graph: ir.Graph, tables: RotaryTables, head_size: int) -> None:
    """Let every row take the factors of its own length.

    Both tables lie one behind the other, short and then long. With a row's length L, n new tokens
    and O the short table's length:  past = max(L - n, 0);  place[t] = past + t + (O if L > O).
    GroupQueryAttention takes no places, so q and k are turned ahead of it.
    """
    assert tables.long is not None, "there are two to choose from"
    nodes = _rotating(graph)
    length = len(tables.short.cos)
    caches = []
    for index, name in ((_COS, "cos"), (_SIN, "sin")):
        old = _input(nodes[0], index)
        assert old.dtype is not None, "factors have a dtype"
        both = np.concatenate([getattr(tables.short, name), getattr(tables.long, name)])
        caches.append(_initializer(graph, f"rotary/{name}", both.astype(old.dtype.numpy())))
    places = _places(graph, nodes[0], length)
    for node in nodes:
        _turn_ahead(graph, node, places, caches, head_size)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        if name.startswith(("cos_cache", "sin_cache")):
            del graph.initializers[name]


def _places(graph: ir.Graph, attention: ir.Node, length: int) -> ir.Value:
    """int64 [batch, n]: where in both tables each new token's factors are."""
    lengths = _input(attention, _LENGTHS)
    ids = next(value for value in graph.inputs if value.name == "input_ids")
    zero, one, limit, axis, flat = (
        _numbers(graph, f"rotary/{name}", number)
        for name, number in (
            ("zero", [0]),
            ("one", [1]),
            ("length", [length]),
            ("axis", 1),
            ("flat", [-1]),
        )
    )
    read = _numbers(graph, READ_LENGTHS, [0])
    read.shape = ir.Shape([READ_LENGTHS])
    graph.inputs.append(read)
    made: list[ir.Node] = []

    def put(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        node = ir.node(op, list(inputs), attributes, name=f"rotary/{op}_{len(made)}")
        node.outputs[0].name = f"rotary/{op}_{len(made)}/output"
        made.append(node)
        return node.outputs[0]

    wide = put("Cast", lengths, to=int(ir.DataType.INT64))
    rows = put("Add", put("Reshape", wide, flat), one)
    # On the device throughout, as a captured graph wants it: no Shape, no Range.
    ones = put("Add", put("Mul", ids, zero), one)
    counts = put("CumSum", ones, axis)
    new = put("ReduceSum", ones, one, keepdims=1)
    total = put("Unsqueeze", rows, one)
    past = put("Max", put("Sub", total, new), zero)
    is_long = put("Greater", put("Unsqueeze", put("Max", rows, read), one), limit)
    shift = put("Where", is_long, limit, zero)
    last = put("Sub", put("Add", put("Add", past, counts), shift), one)
    graph.insert_before(attention, made)
    return last


def _turn_ahead(
    graph: ir.Graph, node: ir.Node, places: ir.Value, caches: list[ir.Value], head_size: int
) -> None:
    """q and k of one layer are turned by nodes of their own."""
    width = _tensor(caches[0]).numpy().shape[1]
    heads = [node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads")]
    norm = node.inputs[_NORM] if len(node.inputs) > _NORM else None
    if norm is not None:
        raise BaseModelError(
            f"node {node.name!r} norms q and k itself, so that rows of different length cannot be"
            " turned by factors of their own; build it without longrope"
        )
    made = []
    q, k, v = _input(node, 0), node.inputs[1], node.inputs[2]
    if k is None or v is None:  # packed: q, k and v side by side
        sizes = [head_size * count for count in (*heads, heads[1])]
        widths = _numbers(graph, f"{node.name}/widths", sizes)
        split = ir.node(
            "Split", [q, widths], {"axis": -1}, num_outputs=3, name=f"{node.name}/split"
        )
        for value, part in zip(split.outputs, "qkv", strict=True):
            value.name = f"{node.name}/{part}"
        made.append(split)
        q, k, v = split.outputs
    turned = []
    interleaved = node.attributes.get_int("rotary_interleaved", 0)
    for value, part, count in ((q, "q", heads[0]), (k, "k", heads[1])):
        rotary = ir.node(
            "RotaryEmbedding",
            [value, places, *caches],
            {
                "interleaved": interleaved,
                "num_heads": count,
                "rotary_embedding_dim": 2 * width,
            },
            domain="com.microsoft",
            name=f"{node.name}/rotary_{part}",
        )
        rotary.outputs[0].name = f"{node.name}/rotary_{part}/output"
        made.append(rotary)
        turned.append(rotary.outputs[0])
    graph.insert_before(node, made)
    for index, value in enumerate((*turned, v)):
        node.replace_input_with(index, value)
    _leave_plain(node)


def _leave_plain(node: ir.Node) -> None:
    """Attention takes q and k as they are."""
    for index in (_COS, _SIN):
        node.replace_input_with(index, None)
    node.attributes["do_rotary"] = ir.AttrInt64("do_rotary", 0)


def _numbers(graph: ir.Graph, name: str, numbers: int | list[int]) -> ir.Value:
    return _initializer(graph, name, np.array(numbers, np.int64))


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor, shape = ir.tensor(array, name=name), ir.Shape(array.shape)
    value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
    graph.initializers.add(value)
    return value


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None, "an initializer has a value"
    return value.const_value


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None, f"{node.op_type} has its input {index}"
    return value


def _attentions(graph: ir.Graph) -> Iterator[ir.Node]:
    """In the order of the layers."""
    return (node for node in graph if node.op_type == _ATTENTION)


def _rotating(graph: ir.Graph) -> list[ir.Node]:
    """Attention that turns q and k itself."""
    return [node for node in _attentions(graph) if node.attributes.get_int("do_rotary", 0)]
