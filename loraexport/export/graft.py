"""Multi-LoRA into an ONNX graph that exists: y' = y + scaling[s] B[s] (A[s] x) at every site.

Masked sites add to what the graph computes; augmented ones take the place of its products, whose W
moves into their stacks. Parameters of the base that a slot has its own of (the scale of the
outputs, the bias, a whole weight) have stacks too, which begin with the base's. What a site adds is
exported from the torch modules that the rest of the project uses, as a function of the graph, which
is called once for each site and then inlined; with kernels what is left of that becomes calls of
the functions that a library may know (see outline).
Graph inputs that join: adapter_ids int64 [batch], and the stacks, which need not be fed; with a
blend adapter_weights float32 [batch, slots], which need not be either.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from loraexport_runtime.contract.kinds import ADAPTER_WEIGHTS
from loraexport_runtime.contract.manifest import FUNCTION_DOMAIN, PARAMETERS, Function

from ..errors import ExportError
from ..graphs.behind import bias_behind, take_place
from ..graphs.products import Graft, Layout, weight_of
from ..tensors import TORCH_DTYPES
from .graft_functions import SiteFunctions, parameters
from .onnx import make_overridable
from .outline import outline

ADAPTER_IDS = "adapter_ids"


def graft(
    model: ir.Model,
    grafts: Sequence[Graft],
    stacks: Mapping[str, np.ndarray],
    num_slots: int,
    dtype: str,
    blend: bool = False,
    kernels: bool = False,
) -> dict[str, Function]:
    """Put multi-LoRA into a graph, in place.

    Args:
        stacks: the initial value of each layer's stacks, by name: of their slots' rows where W^T
            is ahead of these, which is the graph's own.
        dtype: of the sites' inputs and outputs, and of the stacks.
        blend: rows may blend slots.
        kernels: the LoRA part of sites is to be a call of a function.

    Returns:
        Layer -> the function that it calls, if it does.

    Raises:
        ExportError: torch could not export the LoRA part, or the graph has no input.
    """
    graph = model.graph
    opset = model.opset_imports.get("", 0)
    shape = graph.inputs[0].shape if graph.inputs else None
    if shape is None or not len(shape):
        raise ExportError("graft: the graph has no input whose first dimension is the batch")
    adapter_ids = _input(ADAPTER_IDS, [shape[0]], ir.DataType.INT64)
    graph.inputs.append(adapter_ids)
    initial = {}
    for target in grafts:
        for name, tensor in _initial_stacks(target, stacks):
            graph.inputs.append(_input(name, tensor.shape, tensor.dtype))
            initial[name] = tensor
    functions = SiteFunctions(model, num_slots, TORCH_DTYPES[dtype], opset, blend)
    first, selector = graph[0], adapter_ids
    if blend:
        weights = _input(ADAPTER_WEIGHTS, [shape[0], num_slots], ir.DataType.FLOAT)
        graph.inputs.append(weights)
        zeros = np.zeros((1, num_slots), np.float32)
        initial[ADAPTER_WEIGHTS] = ir.Tensor(zeros, name=ADAPTER_WEIGHTS)
        call = functions.selector(adapter_ids, weights)
        graph.insert_before(first, call)
        selector = call.outputs[0]
    routes: dict[tuple[int, Layout, int], ir.Value] = {}
    by_name = {value.name: value for value in graph.inputs}
    for target in grafts:
        layer, ys = target.layer, [node.outputs[0] for node in target.nodes]
        given = []
        if layer.kind == "linear" and layer.stack("lora_A") is not None:
            route = (functions.rows_per_slot(layer), target.layout, target.per_row)
            if route not in routes:
                call = functions.route(target, selector)
                graph.insert_before(first, call)
                routes[route] = call.outputs[0]
            given.append(routes[route])
        if layer.kind == "embedding" or parameters(layer):
            given.append(selector)
        adds = _find_biases(target)
        call = functions.site(target, given, [by_name[stack.name] for stack in layer.stacks])
        graph.insert_after(target.nodes[-1], call)
        for y, new, add in zip(ys, call.outputs, adds, strict=True):
            take_place(graph, y if add is None else add.outputs[0], new, (call,))
        _remove(graph, [add for add in adds if add is not None])
        if layer.strategy == "augmented" or layer.stack("weight") is not None:
            _remove(graph, target.nodes)
    InlinePass()(model)
    del model.opset_imports[FUNCTION_DOMAIN]
    graph.sort()
    layers = [target.layer for target in grafts] if kernels else []
    found = outline(model, layers, num_slots, stacks)
    make_overridable(graph, initial)
    return found


def base_rows(grafts: Sequence[Graft], dtype: np.dtype) -> dict[str, np.ndarray]:
    """The base's rows of every stack that replaces a parameter, by name: 1 for the scale of an
    output, the bias that follows a product, or 0, and W."""
    rows = {}
    for target in grafts:
        for stack in parameters(target.layer):
            value = np.ones((1, stack.shape[1]))
            if stack.role == "weight":
                value = weight_of(target.nodes[0])
            elif stack.role == "bias":
                found = [bias_behind(node) for node in target.nodes]
                pairs = zip(found, target.widths, strict=True)
                value = np.concatenate(
                    [np.zeros(width) if one is None else _array(one[1]) for one, width in pairs]
                )[None]
            rows[stack.name] = value.astype(dtype)
    return rows


def _find_biases(target: Graft) -> list[ir.Node | None]:
    """The Adds of a layer's products whose place is taken, as a slot has a bias of its own."""
    found = [bias_behind(node) for node in target.nodes]
    takes = target.layer.stack("bias") is not None
    return [one[0] if one is not None and takes else None for one in found]


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None, "an initializer has a value"
    return value.const_value.numpy()


def _initial_stacks(
    target: Graft, stacks: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Whole stacks: of those that begin with W, the product's own, put together when written."""
    nodes = iter(target.nodes)
    for stack in target.layer.stacks:
        rows = stacks[stack.name]
        if not stack.row_offset or stack.role in PARAMETERS:
            yield stack.name, ir.Tensor(rows, name=stack.name)
            continue
        weight = next(nodes).inputs[1]
        assert weight is not None, "fit_stacks has looked"
        assert weight.const_value is not None, "fit_stacks has looked"

        def join(w: ir.TensorProtocol = weight.const_value, b: Any = rows) -> ir.TensorProtocol:
            return ir.Tensor(np.concatenate([w.numpy(), b]))

        dtype = ir.DataType.from_numpy(rows.dtype)
        yield stack.name, ir.LazyTensor(join, dtype, ir.Shape(stack.shape), name=stack.name)


def _remove(graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
    """Nodes that nothing uses any more, and their weights if no other has them."""
    values = [value for node in nodes for value in node.inputs if value is not None]
    graph.remove(nodes, safe=True)
    for value in values:
        maker = value.producer()
        if value.is_initializer() and not value.uses() and value.name is not None:
            graph.initializers.pop(value.name, None)
        elif maker is not None and maker.op_type == "Transpose" and not value.uses():
            _remove(graph, [maker])  # between a weight and its product


def _input(name: str, shape: Any, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
