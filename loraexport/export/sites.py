"""The nodes of a layer's LoRA part in a graph, exported or grafted, where they have the form of a
function: see outline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from loraexport_runtime.contract.manifest import Function, Layer

_LINEAR: tuple[Function, ...] = ("LoraLinear", "LoraLinear2", "LoraLinear3")
ADD: tuple[Function, ...] = ("LoraAdd", "LoraAdd2", "LoraAdd3")
"""By the number of products."""


@dataclass(frozen=True)
class Site:
    """The nodes of a site's LoRA part, by what they take and give."""

    name: Function
    overload: str
    route: ir.Node
    """The Unsqueeze of the slots, which the body of Route holds."""
    inputs: tuple[ir.Value, ...]
    """Of the call, routes and ranks left out."""
    ys: tuple[ir.Value, ...]
    at: ir.Node
    """Where the call belongs."""
    attributes: dict[str, int]


def find_site(layer: Layer, stacks: Mapping[str | None, ir.Value], num_slots: int) -> Site | None:
    """The nodes of a layer's LoRA part; None, if they have no function's form."""
    a, bs = layer.stack("lora_A"), [one.name for one in layer.stacks if one.role == "lora_B"]
    if layer.kind != "linear" or a is None or len(bs) > len(_LINEAR):
        return None
    shrink = _user(stacks[a.name])
    is_batched = shrink is not None and shrink.op_type == "Transpose"
    if is_batched and shrink is not None:
        shrink = _user(shrink.outputs[0])
    if shrink is None or shrink.op_type != ("MatMul" if is_batched else "Gemm"):
        return None
    select = _user(shrink.outputs[0])
    if select is None or select.op_type != "Where":
        return None
    own, _, rest = select.inputs
    equal = _maker(own, "Equal")
    if is_batched:
        equal = _maker(input_of(_maker(own, "Unsqueeze"), 0), "Equal")
    route = _maker(input_of(equal, 0), "Unsqueeze")
    x, owners = input_of(shrink, 0), input_of(equal, 1)
    wide = _maker(rest, "Expand")
    row = input_of(wide, 0) if wide is not None else rest
    if route is None or x is None or owners is None or row is None or (wide and is_batched):
        return None
    overload = "batched" if is_batched else "bias" if wide else ""
    attributes = {"num_slots": num_slots, "rows_per_slot": a.rows_per_slot}
    given = (x, owners, row, stacks[a.name])
    weights = [stacks[name] for name in bs]
    if layer.strategy == "augmented":
        attributes["bias_rows"] = a.row_offset
        return _linear(select, overload, route, given, weights, attributes)
    if layer.strategy == "masked" and len(weights) == 1 and wide is None:
        return _add(select, overload, route, given, weights[0], attributes)
    return None


def _linear(
    select: ir.Node,
    overload: str,
    route: ir.Node,
    given: tuple[ir.Value, ...],
    weights: Sequence[ir.Value],
    attributes: dict[str, int],
) -> Site | None:
    """[x | h] [W ; B] of every product."""
    concat = _user(select.outputs[0])
    products = [_user(weight) for weight in weights]
    if concat is None or concat.op_type != "Concat" or concat.inputs[0] is not given[0]:
        return None
    if not all(node and node.op_type == "MatMul" for node in products):
        return None
    ys = tuple(node.outputs[0] for node in products if node)
    if any(node.inputs[0] is not concat.outputs[0] for node in products if node):
        return None
    name = _LINEAR[len(ys) - 1]
    return Site(name, overload, route, (*given, *weights), ys, concat, attributes)


def _add(
    select: ir.Node,
    overload: str,
    route: ir.Node,
    given: tuple[ir.Value, ...],
    b: ir.Value,
    attributes: dict[str, int],
) -> Site | None:
    """y + h B; the columns of a B of several y are parted behind it."""
    expand = _user(b)
    if expand is None or input_of(expand, 0) is not select.outputs[0]:
        return None
    split = _user(expand.outputs[0])
    if expand.op_type == "MatMul" and split is not None and split.op_type == "Split":
        return _add_parts(split, overload, route, (*given, b), attributes)
    if overload == "batched":
        add = _user(expand.outputs[0])
        if expand.op_type != "MatMul" or add is None or add.op_type != "Add":
            return None
        (y,) = [value for value in add.inputs if value is not expand.outputs[0]]
    elif expand.op_type == "Gemm" and len(expand.inputs) == 3:
        add, y = expand, expand.inputs[2]
    else:
        return None
    if y is None:
        return None
    inputs = (y, *given, b)
    return Site("LoraAdd", overload, route, inputs, (add.outputs[0],), add, attributes)


def _add_parts(
    split: ir.Node,
    overload: str,
    route: ir.Node,
    given: tuple[ir.Value, ...],
    attributes: dict[str, int],
) -> Site | None:
    """y_i + the i-th part of h B."""
    widths, ys, sums = input_of(split, 1), [], []
    for part in split.outputs:
        add = _user(part)
        if add is None or add.op_type != "Add":
            return None
        ys += [value for value in add.inputs if value is not None and value is not part]
        sums.append(add)
    if widths is None or len(sums) > len(ADD) or len(ys) != len(sums):
        return None
    inputs, made = (*ys, *given, widths), tuple(add.outputs[0] for add in sums)
    return Site(ADD[len(ys) - 1], overload, route, inputs, made, sums[-1], attributes)


def _user(value: ir.Value) -> ir.Node | None:
    """The one node that takes a value; None, if there are others, or it is an output."""
    users = [user for user, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _maker(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == kind else None


def input_of(node: ir.Node | None, index: int) -> ir.Value | None:
    return node.inputs[index] if node is not None else None
