"""Where a model's linear layers are in an ONNX graph: the products that compute them."""

import re
from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from loraexport_runtime.manifest import Layer

from ..errors import BaseModelError
from .graft import Graft

_PRODUCTS = ("MatMul", "Gemm", "MatMulNBits")
_PACKED = {
    ("q_proj", "k_proj", "v_proj"): "qkv_proj",
    ("gate_proj", "up_proj"): "gate_up_proj",
}
"""Names of sites that an exporter may pack into one product, or the reverse."""


def find_grafts(graph: ir.Graph, layers: Iterable[Layer]) -> list[Graft]:
    """The products of every layer: one for each slice, or packed, or split.

    A product is known by its node's name (`/model/layers.0/attn/q_proj/MatMul`) or by its weight's
    (`model.layers.0.self_attn.q_proj.weight`).

    Raises:
        BaseModelError: a site is not in the graph, or has other sizes there.
    """
    products: dict[str, ir.Node] = {}
    for node in graph:
        if node.op_type in _PRODUCTS and _weight(node) is not None:
            for name in _names(node):
                products.setdefault(_key(name), node)
    return [_find(products, layer) for layer in layers]


def _find(products: Mapping[str, ir.Node], layer: Layer) -> Graft:
    sites = [part.site for part in layer.slices]
    names = next((one for one in _spellings(sites) if all(_key(n) in products for n in one)), None)
    if names is None:
        raise BaseModelError(
            f"site {sites[0]!r}: the base's graph has no product of this name; it has"
            f" {len(products)}, such as {', '.join(list(products)[:3])}"
        )
    nodes = tuple(products[_key(name)] for name in names)
    sizes = [_sizes(node) for node in nodes]
    widths = tuple(size_out for _, size_out in sizes)
    size_in, size_out = {one for one, _ in sizes}, sum(widths)
    if (size_in, size_out) != ({layer.in_features}, layer.out_features):
        raise BaseModelError(
            f"site {sites[0]!r}: node {nodes[0].name!r} maps {sizes[0][0]} to {size_out} features,"
            f" the model {layer.in_features} to {layer.out_features}; the graph is of another model"
        )
    if len({node.inputs[0] for node in nodes}) > 1:
        raise BaseModelError(f"sites {', '.join(sites)}: the graph gives them different inputs")
    return Graft(layer, nodes, widths)


def _spellings(sites: Sequence[str]) -> Iterable[Sequence[str]]:
    """The names of a layer's products: its sites', or those that an exporter packs or splits."""
    yield sites
    parent = sites[0].rpartition(".")[0]
    names = tuple(site.rsplit(".", 1)[-1] for site in sites)
    for parts, packed in _PACKED.items():
        if names == parts:
            yield [f"{parent}.{packed}"]
        if names == (packed,):
            yield [f"{parent}.{part}" for part in parts]


def _names(node: ir.Node) -> Iterable[str]:
    """Module names that a node may stand for."""
    if node.name:
        yield node.name.strip("/").rpartition("/")[0].replace("/", ".")
    weight = _weight(node)
    if weight is not None and weight.name:
        yield re.sub(r"(\.MatMul)?\.(weight|qweight)(_Q\d)?$", "", weight.name)


def _key(name: str) -> str:
    """A module's name without what exporters call otherwise."""
    return name.replace(".self_attn.", ".attn.").removeprefix("model.")


def _weight(node: ir.Node) -> ir.Value | None:
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return value if value is not None and value.is_initializer() else None


def _sizes(node: ir.Node) -> tuple[int, int]:
    """(in, out) of a product."""
    weight = _weight(node)
    assert weight is not None, "a product has a weight"
    if node.op_type == "MatMulNBits":
        return node.attributes["K"].as_int(), node.attributes["N"].as_int()
    assert weight.shape is not None, "an initializer has a shape"
    rows, columns = (int(size) for size in weight.shape)  # type: ignore[arg-type]
    turned = node.attributes.get("transB")
    return (columns, rows) if turned is not None and turned.as_int() else (rows, columns)
