"""Where a model's linear layers are in an ONNX graph: the products that compute them."""

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from loraexport_runtime.contract.manifest import Layer

from ..errors import BaseModelError

_PACKED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}
"""Names of sites that an exporter may pack into one product, or the reverse."""
_QUANTIZED = (
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    "QGemm",
    "QLinearMatMul",
)
"""Of onnxruntime's quantizers, dynamic and static."""
_SCOPES = "pkg.torch.onnx.name_scopes"

Layout = Literal["batched", "flat", "rows"]
"""How x holds the batch's rows: [batch, n, in], [batch * n, in], or [batch, in]."""


@dataclass(frozen=True)
class Product:
    """A node that computes y = x W: MatMul, Gemm, or MatMulNBits; or looks up y = W[x]: Gather, or
    GatherBlockQuantized."""

    node: ir.Node
    weight: ir.Value
    """The initializer that holds W, in whatever form."""
    names: tuple[str, ...]
    """Modules that it may stand for, the surest first."""
    in_features: int
    out_features: int

    @property
    def output(self) -> str:
        """The name of y, which tells products apart."""
        return str(self.node.outputs[0].name)


@dataclass(frozen=True)
class Graft:
    """One layer of the plan and the products whose outputs are the layer's, side by side."""

    layer: Layer
    nodes: tuple[ir.Node, ...]
    """All of the same input."""
    widths: tuple[int, ...]
    """The outputs of each node; together the layer's."""
    layout: Layout
    per_row: int = 0
    """Of flat rows: how many belong to a row, in some example; sites of one number share a mask."""

    @property
    def x(self) -> ir.Value:
        """What the layer gets: of an embedding the ids."""
        x = self.nodes[0].inputs[1 if self.layer.kind == "embedding" else 0]
        assert x is not None, "a product has an input"
        return x


def list_products(graph: ir.Graph) -> list[Product]:
    """Every product of the graph with a weight of its own."""
    products = []
    for node in graph:
        if node.op_type in ("MatMul", "Gemm", "MatMulNBits") and len(node.inputs) > 1:
            weight, turned = _weight(node)
            if weight is not None:
                sizes = _sizes(node, weight, turned)
                if sizes is not None:
                    products.append(Product(node, weight, _names(node, weight), *sizes))
    return products


def _list_tables(graph: ir.Graph) -> Iterable[Product]:
    """The look-ups of a table, by their nodes' names."""
    for node in graph:
        if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            weight, turned = _weight(node, 0)
            if weight is not None and weight.shape is not None and len(weight.shape) == 2:
                rows, width = (int(size) for size in weight.shape)  # type: ignore[arg-type]
                sizes = (width, rows) if turned else (rows, width)
                yield Product(node, weight, _names(node, weight)[-1:], *sizes)
        elif node.op_type == "GatherBlockQuantized":
            yield from _shared_table(node)


def _shared_table(node: ir.Node) -> Iterable[Product]:
    """The look-up in an output layer's int4, which a Reshape gives a row for each token."""
    axis, y = node.attributes.get_int("gather_axis", 0), node.outputs[0]
    maker = None if node.inputs[0] is None else node.inputs[0].producer()
    if maker is None or maker.op_type != "Reshape" or axis != 0:
        return
    weight, table = maker.inputs[0], maker.outputs[0].shape
    if weight is not None and weight.is_initializer() and table is not None and y.shape is not None:
        sizes = table[0], y.shape[-1]
        if isinstance(sizes[0], int) and isinstance(sizes[1], int):
            yield Product(node, weight, _names(node, weight)[-1:], sizes[0], sizes[1])


def count_quantized(graph: ir.Graph) -> int:
    """The products whose weights are integers of 8 bits, which list_products leaves out."""
    count = 0
    for node in graph:
        if node.op_type in _QUANTIZED:
            count += 1
        elif node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1 and node.inputs[1]:
            maker = node.inputs[1].producer()
            if maker is not None and maker.op_type == "Transpose" and maker.inputs[0]:
                maker = maker.inputs[0].producer()
            count += maker is not None and maker.op_type == "DequantizeLinear"
    return count


def find_grafts(graph: ir.Graph, layers: Iterable[Layer]) -> list[Graft]:
    """The products of every layer of a decoder: one for each slice, or packed, or split.

    A product is known by its node's name (`/model/layers.0/attn/q_proj/MatMul`) or by its weight's
    (`model.layers.0.self_attn.q_proj.weight`).

    Raises:
        BaseModelError: a site is not in the graph, or has other sizes there.
    """
    products, tables = _by_name(list_products(graph)), _by_name(_list_tables(graph))
    return [_find(tables if layer.kind == "embedding" else products, layer) for layer in layers]


def _by_name(products: Iterable[Product]) -> dict[str, Product]:
    named: dict[str, Product] = {}
    for product in products:
        for name in product.names:
            named.setdefault(_key(name), product)
    return named


def make_graft(layer: Layer, products: Sequence[Product], layout: Layout, per_row: int) -> Graft:
    """The graft of a layer whose products are known.

    Raises:
        BaseModelError: they have other sizes than the layer, or different inputs.
    """
    sites = [part.site for part in layer.slices]
    first, size_out = products[0], sum(product.out_features for product in products)
    size_in = {product.in_features for product in products}
    if (size_in, size_out) != ({layer.in_features}, layer.out_features):
        raise BaseModelError(
            f"site {sites[0]!r}: node {first.node.name!r} maps {first.in_features} to {size_out}"
            f" features, the model {layer.in_features} to {layer.out_features}; the graph is of"
            " another model"
        )
    if len({product.node.inputs[0] for product in products}) > 1:
        raise BaseModelError(f"sites {', '.join(sites)}: the graph gives them different inputs")
    widths = tuple(product.out_features for product in products)
    return Graft(layer, tuple(product.node for product in products), widths, layout, per_row)


def _find(products: Mapping[str, Product], layer: Layer) -> Graft:
    sites = [part.site for part in layer.slices]
    names = next(
        (spelling for spelling in _spellings(sites) if all(_key(n) in products for n in spelling)),
        None,
    )
    if names is None:
        what = "look-up" if layer.kind == "embedding" else "product"
        such = f"{len(products)}, such as {', '.join(list(products)[:3])}" if products else "none"
        raise BaseModelError(
            f"site {sites[0]!r}: the base's graph has no {what} of this name; it has {such}"
        )
    layer_products = [products[_key(name)] for name in names]
    layout: Layout = "flat" if layer_products[0].node.op_type == "Gemm" else "batched"
    return make_graft(layer, layer_products, layout, 0)


def _spellings(sites: Sequence[str]) -> Iterable[Sequence[str]]:
    """The names of a layer's products: its sites', or those that an exporter packs or splits."""
    yield sites
    yield _pack(sites)
    yield [part for site in sites for part in packed_parts(site)]


def _pack(sites: Sequence[str]) -> list[str]:
    """The sites with one name for all parts of a packed product, where they follow each other: a
    parallel block has others of the same input beside them."""
    names: list[str] = []
    start = 0
    while start < len(sites):
        whole, parts = packed_whole(sites[start])
        is_packed = tuple(sites[start : start + len(parts)]) == parts
        names.append(whole if is_packed else sites[start])
        start += len(parts) if is_packed else 1
    return names


def packed_parts(name: str) -> tuple[str, ...]:
    """The sites that a packed product computes; of any other, itself."""
    parent, _, last = name.rpartition(".")
    for parts, packed in _PACKED.items():
        if last == packed:
            return tuple(f"{parent}.{part}".lstrip(".") for part in parts)
    return (name,)


def packed_whole(name: str) -> tuple[str, tuple[str, ...]]:
    """The site that this one is a part of, and all parts of that; of any other, itself."""
    parent, _, last = name.rpartition(".")
    for parts, packed in _PACKED.items():
        if last in parts:
            every = tuple(f"{parent}.{part}".lstrip(".") for part in parts)
            return f"{parent}.{packed}".lstrip("."), every
    return name, (name,)


def _names(node: ir.Node, weight: ir.Value) -> tuple[str, ...]:
    """From the weight, from the scopes that torch.onnx.export notes, from the node."""
    names = []
    name = str(weight.name)
    # Only a Transpose or a quantizer keeps a module's name; `onnx::MatMul_12` is none.
    stem = re.sub(r"(\.MatMul)?\.(weight|qweight)(_Q\d)?$", "", name)
    if stem != name:
        names.append(stem)
    scopes = _scopes(node)
    if len(scopes) > 1 and scopes[-2]:
        names.append(scopes[-2])
    path = str(node.name or "").strip("/").rpartition("/")[0].replace("/", ".")
    if path:
        names.append(path)
    return tuple(names)


def _scopes(node: ir.Node) -> list[str]:
    """The modules around a node, as torch.onnx.export notes them: the literal of a list."""
    noted = node.metadata_props.get(_SCOPES, "[]")
    try:
        scopes = ast.literal_eval(noted)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        scopes = None
    if not isinstance(scopes, list) or not all(isinstance(scope, str) for scope in scopes):
        raise BaseModelError(
            f"node {node.name!r}: its metadata {_SCOPES!r} is no list of names, but"
            f" {noted[:40]!r}; export the graph again, or remove it"
        )
    return scopes


def _key(name: str) -> str:
    """A module's name without what exporters call otherwise."""
    name = re.sub(r"\.attn\.dense$", ".attn.o_proj", name.replace(".self_attn.", ".attn."))
    return name.removeprefix("model.")


def weight_of(node: ir.Node) -> np.ndarray:
    """W [out, in] of a product of floats, or the table [vocabulary, dim] of a look-up."""
    is_table = node.op_type == "Gather"
    weight, turned = _weight(node, 0 if is_table else 1)
    assert weight is not None, "it was found by its weight"
    assert weight.const_value is not None, "an initializer has a value"
    values = weight.const_value.numpy()
    return values if (not turned if is_table else _is_out_in(node, turned)) else values.T


def _weight(node: ir.Node, index: int = 1) -> tuple[ir.Value | None, bool]:
    """The initializer behind an input of a product, and whether a Transpose is between."""
    value = node.inputs[index]
    maker = value.producer() if value is not None else None
    turned = maker is not None and maker.op_type == "Transpose"
    if turned and maker is not None:
        value = maker.inputs[0]
    return (value if value is not None and value.is_initializer() else None), turned


def _sizes(node: ir.Node, weight: ir.Value, turned: bool) -> tuple[int, int] | None:
    """(in, out) of a product; None if its weight is no matrix."""
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    if weight.shape is None or len(weight.shape) != 2:
        return None
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    return (columns, rows) if _is_out_in(node, turned) else (rows, columns)


def _is_out_in(node: ir.Node, turned: bool) -> bool:
    """Whether a product's initializer is W as torch has it."""
    flag = node.attributes.get("transB")
    return turned != (flag is not None and flag.as_int() == 1)
