"""The functions of domain `loraexport` and their bodies, which are stock operators: see outline."""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from loraexport_runtime.contract.manifest import FUNCTION_DOMAIN

from ..errors import ExportError

IR_VERSION = 10
"""Of ONNX, since which functions have overloads."""
_OPSET = 18
"""Since which the operators of the bodies take what they are given here."""


def function(name: str, overload: str, opset: int) -> ir.Function:
    """A function by its name and overload.

    Args:
        opset: of the graph that calls it.

    Raises:
        ExportError: the graph is of an opset whose operators the bodies cannot be of.
    """
    if opset < _OPSET:
        raise ExportError(
            f"export.kernels: the graph is of opset {opset}, and functions take {_OPSET} or later;"
            " export it with a newer one, or remove export.kernels"
        )
    if name == "Route":
        body, attributes = _Body(["slots"]), []
        body.add("Unsqueeze", ["slots", body.constant(1)], "routes")
    elif name in ("LoraAdd2", "LoraAdd3"):
        numbers = range(1, int(name.removeprefix("LoraAdd")) + 1)
        ys, parts = [f"y_{n}" for n in numbers], [f"added_{n}" for n in numbers]
        body = _Body([*ys, "x", "routes", "ranks", "owners", "rest", "A", "B", "widths"])
        attributes = ["num_slots", "rows_per_slot"]
        _select(body, overload)
        body.add("MatMul", ["own_h", "B"], "added")
        body.add("Split", ["added", "widths"], *parts, axis=-1)
        for y, part in zip(ys, parts, strict=True):
            body.add("Add", [y, part], f"sum_{y.removeprefix('y_')}")
    elif name == "LoraAdd":
        body = _Body(["y", "x", "routes", "ranks", "owners", "rest", "A", "B"])
        attributes = ["num_slots", "rows_per_slot"]
        _select(body, overload)
        if overload == "batched":
            body.add("MatMul", ["own_h", "B"], "added")
            body.add("Add", ["y", "added"], "sum")
        else:
            body.add("Gemm", ["own_h", "B", "y"], "sum")
    else:
        weights = [f"WB_{n}" for n in range(1, int(name.removeprefix("LoraLinear") or "1") + 1)]
        body = _Body(["x", "routes", "ranks", "owners", "rest", "A", *weights])
        attributes = ["num_slots", "rows_per_slot", "bias_rows"]
        _select(body, overload)
        body.add("Concat", ["x", "own_h"], "both", axis=-1)
        for weight in weights:
            body.add("MatMul", ["both", weight], f"y_{weight.removeprefix('WB_')}")
    return body.function(name, overload, opset, attributes)


def _select(body: "_Body", overload: str) -> None:
    """own_h = where(owners == routes, x A^T, rest)."""
    body.add("Equal", ["routes", "owners"], "own")
    own, rest = "own", "rest"
    if overload == "batched":
        own = body.add("Unsqueeze", ["own", body.constant(1)], "own_tokens")
        body.add("Transpose", ["A"], "A_turned", perm=[1, 0])
        body.add("MatMul", ["x", "A_turned"], "h")
    else:
        body.add("Gemm", ["x", "A"], "h", transB=1)
    if overload == "bias":  # read fastest as wide as h
        body.add("Shape", ["own"], "sizes")
        rest = body.add("Expand", ["rest", "sizes"], "wide_rest")
    body.add("Where", [own, "h", rest], "own_h")


class _Body:
    """The nodes of a function, one after the other, named after their outputs."""

    def __init__(self, inputs: Sequence[str]) -> None:
        self._values = {name: ir.Value(name=name) for name in inputs}
        self._inputs = list(self._values.values())
        self._nodes: list[ir.Node] = []

    def add(
        self, kind: str, inputs: Sequence[str], *outputs: str, **attributes: int | Sequence[int]
    ) -> str:
        """A node; the name of its first output."""
        values = [self._values[name] for name in inputs]
        made = [ir.Value(name=name) for name in outputs]
        self._values.update(zip(outputs, made, strict=True))
        self._nodes.append(ir.node(kind, values, attributes, outputs=made, name=outputs[0]))
        return outputs[0]

    def constant(self, number: int) -> str:
        """[number], int64."""
        name = f"constant_{number}"
        return name if name in self._values else self.add("Constant", [], name, value_ints=[number])

    def function(
        self, name: str, overload: str, opset: int, attributes: Sequence[str]
    ) -> ir.Function:
        """All of it; what nothing takes is an output."""
        outputs = [node.outputs[0] for node in self._nodes if not node.outputs[0].uses()]
        graph = ir.Graph(
            self._inputs, outputs, nodes=self._nodes, opset_imports={"": opset}, name=name
        )
        given: Mapping[str, ir.Attr] = {
            key: ir.Attr(key, ir.AttributeType.INT, None) for key in attributes
        }
        return ir.Function(FUNCTION_DOMAIN, name, overload, graph=graph, attributes=given.values())
