"""Multi-LoRA into an ONNX graph that exists: y' = y + scaling[s] B[s] (A[s] x) at every site.

Masked sites add to what the graph computes; augmented ones take the place of its products, whose W
moves into their stacks. The LoRA part of a site is exported from the torch modules that the rest of
the project uses, as a function of the graph, which is called once for each site and then inlined.
Graph inputs that join: adapter_ids int64 [batch], and the stacks, which need not be fed.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Layer

from ..errors import ExportError
from ..graphs.products import Graft, Layout, take_place
from ..lora.augmented import Augmented
from ..lora.masked import Masked
from ..lora.strategy import SiteBase, StackSizes
from ..tensors import TORCH_DTYPES
from .onnx import export_program, make_overridable

ADAPTER_IDS = "adapter_ids"
_DOMAIN = "loraexport"
_BATCH, _TOKENS = torch.export.Dim("batch"), torch.export.Dim("tokens")
_ROWS = torch.export.Dim("rows")


class _Given(SiteBase):
    """The base's output, which the graph has computed."""

    def __init__(self, y: Tensor) -> None:
        super().__init__(None, None)
        self._y = y

    def forward(self, x: Tensor) -> Tensor:
        """y, whatever x is."""
        return self._y


class _Site(nn.Module):
    """y' = y + where(own, x A^T, 0) B for one layer, y in one part or one per slice."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.lora = Masked(sizes)

    def forward(self, x: Tensor, own: Tensor, a: Tensor, b: Tensor, ys: list[Tensor]) -> Any:
        """x [batch, n, in], own bool [batch, 1, S * W], ys [batch, n, out] -> the same as ys.

        Or x [rows, in], own [rows, S * W], ys [rows, out].
        """
        routing = own, own, self.lora.rest(own)
        if len(ys) == 1:
            return (self.lora.linear(x, _Given(ys[0]), routing, a, b),)
        # Added part by part: joined, all of y would be written twice more.
        added = self.lora.shrink_own(x, routing, a) @ b
        parts = torch.split(added, [y.shape[-1] for y in ys], dim=-1)
        return tuple(y + part for y, part in zip(ys, parts, strict=True))


class _AugmentedSite(nn.Module):
    """y' = [x | where(own, x A^T, 0)] [W^T ; B] of every product of one layer."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.lora = Augmented(sizes)

    def forward(self, x: Tensor, own: Tensor, a: Tensor, bs: list[Tensor]) -> Any:
        """x [batch, n, in], own bool [batch, 1, S * W], bs [in + S * W, out] -> [batch, n, out]."""
        return tuple(self.lora.slices(x, (own, own, self.lora.rest(own)), a, bs))


class _Route(nn.Module):
    """Which columns of the stacks are each row's own."""

    def __init__(self, sizes: StackSizes, layout: Layout) -> None:
        super().__init__()
        self.lora = Masked(sizes)
        self._layout = layout

    def forward(self, adapter_ids: Tensor, x: Tensor | None = None) -> Tensor:
        """adapter_ids int64 [batch] -> own bool [batch, S * W], or [batch, 1, S * W], which serves
        every token; for flat x [batch * n, in] [batch * n, S * W]."""
        per_row = 1 if x is None else x.shape[0] // adapter_ids.shape[0]
        own = self.lora.route_rows(adapter_ids, per_row)[1]
        return own.unsqueeze(1) if self._layout == "batched" else own


def graft(
    model: ir.Model,
    grafts: Sequence[Graft],
    stacks: Mapping[str, np.ndarray],
    num_slots: int,
    dtype: str,
) -> None:
    """Put multi-LoRA into a graph, in place.

    Args:
        stacks: the initial value of the slots' rows of each layer's stacks, by name.
        dtype: of the sites' inputs and outputs, and of the stacks.

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
    for one in grafts:
        for name, tensor in _initial_stacks(one, stacks):
            graph.inputs.append(_input(name, tensor.shape, tensor.dtype))
            initial[name] = tensor
    parts = _Parts(model, num_slots, TORCH_DTYPES[dtype], opset)
    first = graph[0]
    routes: dict[tuple[tuple[int, ...], Layout, int], ir.Value] = {}
    by_name = {value.name: value for value in graph.inputs}
    for one in grafts:
        x, ys = one.nodes[0].inputs[0], [node.outputs[0] for node in one.nodes]
        assert x is not None, "a product has an input"
        route = (parts.sizes(one.layer).slot_rows, one.layout, one.per_row)
        if route not in routes:
            call = parts.route(one, adapter_ids, x)
            graph.insert_before(first, call)
            routes[route] = call.outputs[0]
        own = [by_name[stack.name] for stack in one.layer.stacks]
        call = parts.site(one, x, routes[route], own)
        graph.insert_after(one.nodes[-1], call)
        for y, new in zip(ys, call.outputs, strict=True):
            take_place(graph, y, new, (call,))
        if one.layer.strategy == "augmented":
            _remove(graph, one.nodes)
    InlinePass()(model)
    del model.opset_imports[_DOMAIN]
    graph.sort()
    make_overridable(graph, initial)


def _initial_stacks(
    one: Graft, stacks: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """Whole stacks: of those that begin with W, the product's own, put together when written."""
    nodes = iter(one.nodes)
    for stack in one.layer.stacks:
        rows = stacks[stack.name]
        if not stack.row_offset:
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
    weights = [node.inputs[1] for node in nodes]
    graph.remove(nodes, safe=True)
    for weight in weights:
        if weight is not None and weight.name is not None and not weight.uses():
            graph.initializers.pop(weight.name, None)


class _Parts:
    """The functions of a model, exported once for each shape of layer."""

    def __init__(self, model: ir.Model, num_slots: int, dtype: torch.dtype, opset: int) -> None:
        self._model = model
        self._num_slots = num_slots
        self._dtype = dtype
        self._opset = opset
        self._numbers: dict[tuple[int, ...], int] = {}
        model.opset_imports[_DOMAIN] = 1

    def sizes(self, layer: Layer) -> StackSizes:
        return StackSizes.of(layer, self._num_slots, self._dtype)

    def _number(self, sizes: StackSizes) -> int:
        """Of the rows of the slots, for the names of functions."""
        return self._numbers.setdefault(sizes.slot_rows, len(self._numbers))

    def route(self, one: Graft, adapter_ids: ir.Value, x: ir.Value) -> ir.Node:
        """A call of `_Route`."""
        sizes, size = self.sizes(one.layer), one.layer.in_features
        name, is_flat = f"route_{self._number(sizes)}_{one.layout}", one.layout == "flat"
        name += f"_{size}" * is_flat
        if (_DOMAIN, name, "") not in self._model.functions:
            arguments = [torch.zeros(3, dtype=torch.int64)]
            shapes = [{0: _BATCH}]
            if is_flat:
                arguments.append(torch.zeros(21, size, dtype=self._dtype))
                shapes.append({0: _ROWS})
            route = _Route(sizes, one.layout)
            self._add(name, route, tuple(arguments), tuple(shapes))
        return self._call(name, [adapter_ids, x] if is_flat else [adapter_ids], 1)

    def site(
        self,
        one: Graft,
        x: ir.Value,
        own: ir.Value,
        stacks: Sequence[ir.Value],
    ) -> ir.Node:
        """A call of `_Site`, or of `_AugmentedSite`."""
        layer, widths = one.layer, one.widths
        sizes, size = self.sizes(layer), layer.in_features
        name = f"{layer.strategy}_{self._number(sizes)}_{size}"
        name += f"_{'_'.join(map(str, widths))}_{one.layout}"
        ys = [node.outputs[0] for node in one.nodes]
        is_augmented = layer.strategy == "augmented"
        if (_DOMAIN, name, "") not in self._model.functions:
            columns = sum(sizes.slot_rows)
            lead, own_lead, row, own_row = [21], [21], {0: _ROWS}, {0: _ROWS}
            if one.layout == "batched":
                lead, own_lead = [3, 7], [3, 1]
                row, own_row = {0: _BATCH, 1: _TOKENS}, {0: _BATCH}
            bs = [
                torch.zeros(stack.shape, dtype=self._dtype)
                for stack in layer.stacks
                if stack.role == "lora_B"
            ]
            arguments: tuple[Any, ...] = (
                torch.zeros(*lead, size, dtype=self._dtype),
                torch.zeros(*own_lead, columns, dtype=torch.bool),
                torch.zeros(columns, size, dtype=self._dtype),
            )
            shapes: tuple[Any, ...] = (row, own_row, None)
            if is_augmented:
                site: nn.Module = _AugmentedSite(sizes)
                arguments, shapes = (*arguments, bs), (*shapes, [None] * len(bs))
            else:
                site = _Site(sizes)
                given = [torch.zeros(*lead, width, dtype=self._dtype) for width in widths]
                arguments = (*arguments, bs[0], given)
                shapes = (*shapes, None, [row] * len(widths))
            self._add(name, site, arguments, shapes)
        return self._call(name, [x, own, *stacks, *([] if is_augmented else ys)], len(ys))

    def _call(self, name: str, inputs: Sequence[ir.Value], num_outputs: int) -> ir.Node:
        return ir.Node(_DOMAIN, name, inputs, num_outputs=num_outputs)

    def _add(self, name: str, module: nn.Module, arguments: Any, shapes: Any) -> None:
        program = export_program(name, module.eval(), arguments, shapes, self._opset)
        graph = program.graph
        for initializer in list(graph.initializers.values()):  # a function has none
            value = ir.Attr("value", ir.AttributeType.TENSOR, initializer.const_value)
            constant = ir.Node("", "Constant", [], [value])
            graph.insert_before(graph[0], constant)
            initializer.replace_all_uses_with(constant.outputs[0])
        graph.initializers.clear()
        function = ir.Function(_DOMAIN, name, "", graph=graph, attributes={})
        self._model.functions[function.identifier()] = function


def _input(name: str, shape: Any, dtype: ir.DataType) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
