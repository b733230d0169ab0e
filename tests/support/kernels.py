"""Graphs of one op of the domain `loraexport`, and what they must give, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

Array = np.ndarray[Any, np.dtype[Any]]

TYPES = {
    "float32": (TensorProto.FLOAT, np.float32, 2.0**-18),
    "float16": (TensorProto.FLOAT16, np.float16, 2.0**-10),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 2.0**-7),
}
"""ONNX's type, numpy's, and what a result may be off, in parts of the sum of its absolute terms:
in float16 and bfloat16 that is a rounding of h and one of y, in float32 the order of the sums."""


@dataclass(frozen=True)
class Site:
    """The values of one call, exact in `dtype` and kept in float64.

    Shapes: slots [R], x [T, in], ranks [S], a [S * W, in]; weights [in, out], biases [out] and bs
    [S * W, out] one for each slice. For LoraAdd the weights are what the y are: [T, out].
    """

    dtype: str
    num_slots: int
    slots: Array
    x: Array
    ranks: Array
    a: Array
    weights: Sequence[Array]
    bs: Sequence[Array]
    biases: Sequence[Array] = field(default=())
    add: bool = False

    @property
    def width(self) -> int:
        return self.a.shape[0] // self.num_slots

    def rows(self, slot: int) -> slice:
        """Those that a slot's adapter has."""
        first = (slot - 1) * self.width
        return slice(first, first + min(max(0, int(self.ranks[slot - 1])), self.width))

    def expected(self) -> tuple[list[Array], list[Array]]:
        """y of each slice [T, out], and the sums of absolute terms behind it."""
        ys, sizes = [], []
        for index, (weight, b) in enumerate(zip(self.weights, self.bs, strict=True)):
            y = weight.copy() if self.add else self.x @ weight
            size = abs(y) if self.add else abs(self.x) @ abs(weight)
            if self.biases:
                y += self.biases[index]
                size += abs(self.biases[index])
            per_row = len(self.x) // max(1, len(self.slots))
            for token in range(len(self.x)):
                slot = int(self.slots[token // per_row])
                if 1 <= slot <= self.num_slots:
                    own = self.rows(slot)
                    y[token] += self.x[token] @ self.a[own].T @ b[own]
                    size[token] += abs(self.x[token]) @ abs(self.a[own]).T @ abs(b[own])
            ys.append(y)
            sizes.append(size)
        return ys, sizes

    def changed(self, **values: Any) -> "Site":
        return replace(self, **values)


def random_site(
    seed: int,
    *,
    dtype: str = "float32",
    rows: int = 4,
    per_row: int = 1,
    num_slots: int = 3,
    width: int = 8,
    in_features: int = 16,
    outs: Sequence[int] = (16,),
    ranks: Sequence[int] | None = None,
    bias: bool = False,
    add: bool = False,
) -> Site:
    """Values around 1; slots from -2 to S + 2, of which -2, -1, 0, S + 1 and S + 2 are the base.

    Args:
        ranks: of the slots; default: each has all of its rows.
    """
    draw = np.random.default_rng(seed)

    def values(*shape: int) -> Array:
        return draw.standard_normal(shape).astype(TYPES[dtype][1]).astype(np.float64)

    tokens, stack = rows * per_row, num_slots * width
    return Site(
        dtype=dtype,
        num_slots=num_slots,
        slots=draw.integers(-2, num_slots + 3, rows),
        x=values(tokens, in_features),
        ranks=np.full(num_slots, width) if ranks is None else np.array(ranks),
        a=values(stack, in_features),
        weights=[values(tokens if add else in_features, out) for out in outs],
        bs=[values(stack, out) for out in outs],
        biases=[values(out) for out in outs] if bias else (),
        add=add,
    )


class Graph:
    """The op of a site in onnxruntime: float32 in and out, casts around."""

    def __init__(self, site: Site, library: Path, providers: Sequence[str] = ("cpu",)) -> None:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        names = [
            f"{name.upper() if name == 'cuda' else 'CPU'}ExecutionProvider" for name in providers
        ]
        self.session = onnxruntime.InferenceSession(
            make_model(site).SerializeToString(), options, providers=names
        )

    def run(self, site: Site) -> list[Array]:
        """y of each slice [T, out], float32."""
        feeds = {name: value.astype(np.int64) for name, value in integers_of(site).items()}
        for name, value in inputs_of(site).items():
            feeds[name] = value.astype(np.float32)
        return list(self.session.run(None, feeds))


def integers_of(site: Site) -> dict[str, Array]:
    """The inputs that say what is used, by name."""
    return {"slots": site.slots, "ranks": site.ranks.reshape(-1, 1)}


def inputs_of(site: Site) -> dict[str, Array]:
    """The op's inputs of the site's type, by name."""
    if site.add:
        ys = {f"base{index + 1}": base for index, base in enumerate(site.weights)}
        return {**ys, "x": site.x, "a": site.a, "b": np.concatenate(site.bs, axis=1)}
    padding = np.full((8, site.a.shape[1]), np.inf)  # nobody reads the rows that stand for the bias
    a = np.concatenate([padding, site.a]) if site.biases else site.a
    stacks = {}
    for index, (weight, b) in enumerate(zip(site.weights, site.bs, strict=True)):
        parts = [weight, b]
        if site.biases:
            rows = np.full((8, weight.shape[1]), np.inf)
            rows[0] = site.biases[index]
            parts = [weight, rows, b]
        stacks[f"wb{index + 1}"] = np.concatenate(parts)
    return {"x": site.x, "a": a, **stacks}


def make_model(site: Site) -> onnx.ModelProto:
    element = TYPES[site.dtype][0]
    given = inputs_of(site)
    nodes = [helper.make_node("Route", ["slots"], ["routes"], domain="loraexport")]
    nodes += [helper.make_node("Cast", [name], [f"{name}_"], to=element) for name in given]
    nodes.append(helper.make_node("Constant", [], ["owners"], value_ints=[1]))
    nodes.append(helper.make_node("Cast", ["zero"], ["rest"], to=element))
    attributes = {"num_slots": site.num_slots, "rows_per_slot": site.width}
    common = ["x_", "routes", "ranks", "owners", "rest", "a_"]
    ys = [f"y{index + 1}" for index in range(len(site.weights))]
    if site.add:
        name = "LoraAdd" + ("" if len(ys) == 1 else str(len(ys)))
        inputs = [*(f"base{index + 1}_" for index in range(len(ys))), *common, "b_"]
        if len(ys) > 1:
            widths = [base.shape[1] for base in site.weights]
            nodes.append(helper.make_node("Constant", [], ["widths"], value_ints=widths))
            inputs.append("widths")
    else:
        name = "LoraLinear" + ("" if len(ys) == 1 else str(len(ys)))
        inputs = [*common, *(f"wb{index + 1}_" for index in range(len(ys)))]
        attributes["bias_rows"] = 8 if site.biases else 0
    made = [f"{y}_" for y in ys]
    nodes.append(helper.make_node(name, inputs, made, domain="loraexport", **attributes))
    nodes += [helper.make_node("Cast", [f"{y}_"], [y], to=TensorProto.FLOAT) for y in ys]
    shapes = {name: value.shape for name, value in given.items()}
    dims: dict[str, list[int | str]] = {name: list(shape) for name, shape in shapes.items()}
    dims["x"][0] = "tokens"
    if site.add:
        for index in range(len(ys)):
            dims[f"base{index + 1}"][0] = "tokens"
    graph = helper.make_graph(
        nodes,
        "site",
        [
            helper.make_tensor_value_info("slots", TensorProto.INT64, ["rows"]),
            helper.make_tensor_value_info("ranks", TensorProto.INT64, [site.num_slots, 1]),
        ]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims[name]) for name in given],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None) for y in ys],
        [helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0])],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("loraexport", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 10
    return model


def assert_right(site: Site, ys: Sequence[Array]) -> None:
    """Every element is as near to the oracle as its type allows."""
    for y, expected, size in zip(ys, *site.expected(), strict=True):
        allowed = TYPES[site.dtype][2] * size + 1e-6
        worst = np.max(abs(y - expected) / allowed, initial=0.0)
        assert np.isfinite(y).all(), "every value of these sites is finite"
        assert worst <= 1, f"off by {worst} times what is allowed"
