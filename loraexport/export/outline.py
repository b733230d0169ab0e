"""The LoRA part of a site as a call of an ONNX function of domain `loraexport`.

A function's body holds the operators that stood in the graph, so that onnxruntime, which puts a
body in the place of its call, computes what it did. Where a host has registered a library that has
kernels of these names, a kernel takes the call instead.

Shapes: T tokens, R rows whose slots are given (T is a multiple of R), S slots of which each has W
stack rows, K = S * W, K' = K and the rows of the bias (0 or 8).

    Route(slots [R]) -> routes
    LoraLinear(x [T, in], routes, ranks [S, 1], owners [1, K'], rest, A [K', in], WB [in + K', out])
        -> y [T, out]
    LoraAdd(y [T, out], x [T, in], routes, ranks, owners [1, K], rest, A [K, in], B [K, out])
        -> [T, out]

LoraLinear2 and LoraLinear3 take so many WB and give so many y; LoraAdd2 and LoraAdd3 take so many y
ahead of x, and behind B, which has the columns of all of them, how wide each is. `routes` is
whatever Route makes of the slots, which functions of this domain alone read. `ranks` is a stack
too, of role rank: how many of its W rows a slot's adapter has, for kernels; the bodies multiply by
the zeros behind them. Bodies that differ have one name and an overload each: "" of x [T, in],
"bias" of that with rows for a bias, "batched" of x [R, n, in].
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from loraexport_runtime.contract.manifest import FUNCTION_DOMAIN, Function, Layer

from ..errors import ExportError
from .functions import IR_VERSION, function
from .ranks import add_ranks, rank_stack
from .sites import ADD, Site, find_site, input_of

_NAMED = 4


def outline(
    model: ir.Model, layers: Sequence[Layer], num_slots: int, initial: Mapping[str, np.ndarray]
) -> dict[str, Function]:
    """Make the LoRA part of every site that has the form of a function a call of it, in place.

    What has another form stays: embeddings, blends, the strategies segmented and chunked, and sites
    of more products than a function has.

    Args:
        model: with the stacks among its graph's inputs, by name; with those of the ranks behind.
        initial: the values of the stacks of role lora_A, by name, or of their slots' rows alone.

    Returns:
        Layer -> the function that it calls, of the layers that call one.
    """
    stacks = {value.name: value for value in model.graph.inputs}
    found: dict[str, Function] = {}
    routes: dict[Any, ir.Value] = {}
    for layer in layers:
        site = find_site(layer, stacks, num_slots)
        if site is None:
            continue
        slots = _origin(site.route.inputs[0])
        if slots not in routes:
            routes[slots] = _call_route(model, site.route)
        ranks = add_ranks(model.graph, layer, num_slots, initial)
        _call_site(model, site, routes[slots], ranks)
        found[layer.name] = site.name
    if found:
        model.opset_imports[FUNCTION_DOMAIN] = 1
        model.ir_version = max(model.ir_version, IR_VERSION)
        RemoveUnusedNodesPass()(model)
        model.graph.sort()  # a Route may stand behind a site that came later among the layers
    return found


def with_functions(
    layers: Sequence[Layer], found: Mapping[str, Function], num_slots: int
) -> tuple[tuple[Layer, ...], str]:
    """The layers of graphs that call functions, with the stacks of the ranks, and in words which
    of them do not.

    Raises:
        ExportError: none does.
    """
    if not found:
        kinds = ", ".join(sorted({f"{layer.kind} by {layer.strategy}" for layer in layers}))
        raise ExportError(
            f"export.kernels: no site could be a call of a function (they are {kinds}). Linear"
            " layers can, by the strategies masked and augmented, without export.blend; remove"
            " export.kernels"
        )
    other = [layer.name for layer in layers if layer.name not in found]
    said = f"{len(found)} of {len(layers)} layers call functions that kernels may take"
    if other:
        more = ", …" if len(other) > _NAMED else ""
        said += f"; these call none: {', '.join(other[:_NAMED])}{more}"
    return tuple(_marked(layer, found.get(layer.name), num_slots) for layer in layers), said


def _marked(layer: Layer, function: Function | None, num_slots: int) -> Layer:
    if function is None:
        return layer
    stacks = (*layer.stacks, rank_stack(layer, num_slots))
    return replace(layer, function=function, stacks=stacks)


def _origin(slots: ir.Value | None) -> Any:
    """What slots are made of: equal for values that are, as every width of a graft routes anew."""
    maker = slots.producer() if slots is not None else None
    if slots is None or (maker is None and slots.const_value is None):
        return slots
    constant = slots.const_value if maker is None else maker.attributes.get("value")
    if isinstance(constant, ir.Attr):
        constant = constant.as_tensor()
    if constant is not None:
        return constant.dtype, tuple(constant.shape.numpy()), constant.tobytes()
    if maker is None or maker.op_type not in ("Unsqueeze", "Expand", "Reshape"):
        return slots
    return maker.op_type, *map(_origin, maker.inputs)


def _call_route(model: ir.Model, unsqueeze: ir.Node) -> ir.Value:
    """Route(slots), ahead of where its Unsqueeze is."""
    slots = input_of(unsqueeze, 0)
    assert slots is not None, "an Unsqueeze has an input"
    call = _call(model, "Route", "", [slots], {}, unsqueeze, 1)
    model.graph.insert_before(unsqueeze, call)
    return call.outputs[0]


def _call_site(model: ir.Model, site: Site, routes: ir.Value, ranks: ir.Value) -> None:
    place = 1 + len(site.ys) if site.name in ADD else 1
    inputs = [*site.inputs[:place], routes, ranks, *site.inputs[place:]]
    call = _call(model, site.name, site.overload, inputs, site.attributes, site.at, len(site.ys))
    model.graph.insert_after(site.at, call)
    for old, new in zip(site.ys, call.outputs, strict=True):
        new.type, new.shape, name = old.type, old.shape, old.name
        old.name = f"{name}_before"
        new.name = name
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _call(
    model: ir.Model,
    name: str,
    overload: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, int],
    old: ir.Node,
    num_outputs: int,
) -> ir.Node:
    """A call, named as what it stands for, of a function that the model then has."""
    if (FUNCTION_DOMAIN, name, overload) not in model.functions:
        made = function(name, overload, model.opset_imports[""])
        model.functions[made.identifier()] = made
    call = ir.node(
        name, inputs, attributes, domain=FUNCTION_DOMAIN, overload=overload, num_outputs=num_outputs
    )
    call.name = f"{old.name}/{name}" if old.name else None
    call.metadata_props.update(old.metadata_props)  # it says which module the node is of
    return call
