"""The functions that a graft adds to a graph, until they are inlined: what they compute is in
graft_modules.py."""

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import FUNCTION_DOMAIN, PARAMETERS, Layer, Stack

from ..graphs.products import Graft
from ..lora.rows import RowBlend, RowSlots
from ..lora.strategy import StackSizes
from .graft_modules import AugmentedSite, Route, Selector, Site
from .onnx import export_program

_BATCH, _TOKENS = torch.export.Dim("batch"), torch.export.Dim("tokens")
_ROWS = torch.export.Dim("rows")
Example = tuple[nn.Module, Any, Any]
_EXPORTED: dict[tuple[Any, ...], ir.Graph] = {}
"""What functions are made of -> their graphs, of models of before too: an export takes a second."""
_MOST_EXPORTED = 256


def parameters(layer: Layer) -> list[Stack]:
    """The stacks of a layer that replace a parameter of the base."""
    return [stack for stack in layer.stacks if stack.role in PARAMETERS]


class SiteFunctions:
    """The functions of a model, exported once for each shape of layer, also of several models."""

    def __init__(
        self, model: ir.Model, num_slots: int, dtype: torch.dtype, opset: int, blend: bool
    ) -> None:
        self._model = model
        self._rows = RowBlend(num_slots, dtype) if blend else RowSlots(num_slots)
        self._num_slots = num_slots
        self._dtype = dtype
        self._opset = opset
        self._numbers: dict[int, int] = {}
        model.opset_imports[FUNCTION_DOMAIN] = 1

    def rows_per_slot(self, layer: Layer) -> int:
        """Of a layer's A and B."""
        return self._sizes(layer).rows_per_slot

    def _sizes(self, layer: Layer) -> StackSizes:
        return StackSizes.of(layer, self._num_slots, self._dtype)

    def _number(self, sizes: StackSizes) -> int:
        """Of the rows of the slots, for the names of functions."""
        return self._numbers.setdefault(sizes.rows_per_slot, len(self._numbers))

    def _selector(self, batch: int) -> tuple[Tensor, dict[int, Any]]:
        """An example of what selects the slots of so many rows, and its shape."""
        size: tuple[int, ...] = (batch,)
        if not isinstance(self._rows, RowBlend):
            return torch.zeros(size, dtype=torch.int64), {0: _BATCH}
        return torch.zeros(batch, self._num_slots, dtype=self._dtype), {0: _BATCH}

    def selector(self, adapter_ids: ir.Value, weights: ir.Value) -> ir.Node:
        """A call of `Selector`."""
        rows = self._rows
        assert isinstance(rows, RowBlend), "else adapter_ids select"
        ids, mix = torch.zeros(3, dtype=torch.int64), torch.zeros(3, self._num_slots)
        shapes = {0: _BATCH}, {0: _BATCH}
        self._add("selector", (), lambda: (Selector(rows), (ids, mix), shapes))
        return self._call("selector", [adapter_ids, weights], 1)

    def route(self, target: Graft, selector: ir.Value) -> ir.Node:
        """A call of `Route`."""
        sizes, size = self._sizes(target.layer), target.layer.in_features
        name, is_flat = f"route_{self._number(sizes)}_{target.layout}", target.layout == "flat"
        name += f"_{size}" * is_flat
        if (FUNCTION_DOMAIN, name, "") not in self._model.functions:
            example, shape = self._selector(3)
            arguments, shapes = [example], [shape]
            if is_flat:
                arguments.append(torch.zeros(21, size, dtype=self._dtype))
                shapes.append({0: _ROWS})
            route = Route(sizes, target.layout, isinstance(self._rows, RowBlend))
            self._add(name, (sizes,), lambda: (route, tuple(arguments), tuple(shapes)))
        return self._call(name, [selector, target.x] if is_flat else [selector], 1)

    def site(
        self, target: Graft, routes: Sequence[ir.Value], stacks: Sequence[ir.Value]
    ) -> ir.Node:
        """A call of `Site`, or of `AugmentedSite`.

        Args:
            routes: of a linear layer with A and B what `route` gives, and for an embedding or
                parameters what selects.
        """
        layer, roles = target.layer, [stack.role for stack in target.layer.stacks]
        sizes = self._sizes(layer) if "lora_A" in roles else None
        number = "" if sizes is None else self._number(sizes)
        widths = "_".join(map(str, target.widths))
        name = f"{layer.kind}_{layer.strategy}_{number}_{layer.in_features}_{widths}"
        name += f"_{target.layout}{''.join(f'_{stack.role}' for stack in parameters(layer))}"
        ys = [node.outputs[0] for node in target.nodes]
        takes_ys = layer.strategy != "augmented" and "weight" not in roles
        if (FUNCTION_DOMAIN, name, "") not in self._model.functions:
            stacks_of = tuple((stack.role, stack.shape) for stack in layer.stacks)
            made_of = sizes, stacks_of
            self._add(name, made_of, lambda: self._example(target, sizes, takes_ys))
        behind = ys if takes_ys else []
        return self._call(name, [target.x, *routes, *stacks, *behind], len(ys))

    def _example(self, target: Graft, sizes: StackSizes | None, takes_ys: bool) -> Example:
        """The module of a site, arguments to export it with, and their shapes."""
        layer, is_embedding = target.layer, target.layer.kind == "embedding"
        lead, row = [21], {0: _ROWS}
        if target.layout == "batched":
            lead, row = [3, 7], {0: _BATCH, 1: _TOKENS}
        x = torch.zeros(*lead, layer.in_features, dtype=self._dtype)
        routes: list[Tensor] = []
        route_shapes: list[Any] = []
        if is_embedding:
            x = torch.zeros(*lead, dtype=torch.int64)
        elif sizes is not None:
            blends = isinstance(self._rows, RowBlend)
            own = [lead[0], *[1] * (len(lead) - 1), sizes.num_slots * sizes.rows_per_slot]
            routes.append(torch.zeros(*own, dtype=self._dtype if blends else torch.bool))
            route_shapes.append({0: row[0]})
        if is_embedding or parameters(layer):
            example, shape = self._selector(lead[0])
            routes, route_shapes = [*routes, example], [*route_shapes, shape]
        values = [torch.zeros(stack.shape, dtype=self._dtype) for stack in layer.stacks]
        arguments: tuple[Any, ...] = (x, routes, values)
        shapes: tuple[Any, ...] = (row, route_shapes, [None] * len(values))
        if layer.strategy == "augmented":
            assert sizes is not None, "W moves for the sake of B"
            return AugmentedSite(sizes), arguments, shapes
        widths = target.widths if takes_ys else ()
        ys = [torch.zeros(*lead, width, dtype=self._dtype) for width in widths]
        site = Site(layer, sizes, self._rows)
        return site, (*arguments, ys), (*shapes, [row] * len(ys))

    def _call(self, name: str, inputs: Sequence[ir.Value], num_outputs: int) -> ir.Node:
        return ir.Node(FUNCTION_DOMAIN, name, inputs, num_outputs=num_outputs)

    def _add(self, name: str, made_of: tuple[Any, ...], example: Callable[[], Example]) -> None:
        """Put a function into the model.

        Args:
            made_of: what it is made of, beside what its name says and what all of a model share.
            example: its module, arguments to export it with, and their shapes.
        """
        blends = isinstance(self._rows, RowBlend)
        key = (name, *made_of, self._num_slots, self._dtype, self._opset, blends)
        if key not in _EXPORTED:
            while len(_EXPORTED) >= _MOST_EXPORTED:
                _EXPORTED.pop(next(iter(_EXPORTED)))
            _EXPORTED[key] = _export(name, *example(), self._opset)
        graph = _EXPORTED[key].clone()
        function = ir.Function(FUNCTION_DOMAIN, name, "", graph=graph, attributes={})
        self._model.functions[function.identifier()] = function


def _export(name: str, module: nn.Module, arguments: Any, shapes: Any, opset: int) -> ir.Graph:
    graph = export_program(name, module.eval(), arguments, shapes, opset).graph
    for initializer in list(graph.initializers.values()):  # a function has none
        value = ir.Attr("value", ir.AttributeType.TENSOR, initializer.const_value)
        constant = ir.Node("", "Constant", [], [value])
        graph.insert_before(graph[0], constant)
        initializer.replace_all_uses_with(constant.outputs[0])
    graph.initializers.clear()
    return graph
