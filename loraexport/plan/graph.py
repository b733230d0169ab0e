"""The sites of an ONNX graph that exists. No weight is read, and no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.contract.kinds import Facts, Tag
from loraexport_runtime.errors import AdapterWeightsError

from ..errors import BaseModelError
from ..graphs.files import read_graph
from ..graphs.places import Place, find_places
from ..graphs.products import Product, list_products
from ..hf.facts import read_facts
from ..spec.schema import OnnxSpec, Spec
from .layer import LayerPlan, make_layer_plan, refuse_features
from .sites import named_sites, site_layer
from .stacks import true_rows

_OUTPUT_LAYERS = ("lm_head", "classifier", "score")
"""What all-linear leaves out, by the first or last part of a name."""


@dataclass(frozen=True)
class GraphPlan:
    """An ONNX graph: where it lies, and which products are the layers."""

    tag: ClassVar[Tag] = "graph"

    directory: Path
    file: Path
    products: dict[str, tuple[str, ...]]
    """Layer -> the outputs of its products."""
    facts: Facts


def plan_graph(
    base: OnnxSpec,
    directory: Path,
    generates: bool,
    headers: Sequence[AdapterHeader],
    spec: Spec,
    num_slots: int,
    max_rank: int,
) -> tuple[tuple[LayerPlan, ...], GraphPlan]:
    """Plan the sites of a graph: products that get one tensor are slices of one layer.

    Args:
        generates: the directory is a folder of onnxruntime-genai, whose graph takes a KV cache.

    Raises:
        BaseModelError: the graph cannot be read, is of another dtype, or a rule fits no product.
        AdapterConfigError: an adapter brings more than A and B of linear layers.
        AdapterWeightsError: an adapter has modules that the graph lacks.
    """
    file = directory / base.file
    products = list_products(read_graph(file).graph)
    config = read_genai_config(directory, BaseModelError)["model"] if generates else None
    modules = {module for header in headers for module in header.modules}
    places = find_places(products, base.sites, config, modules, file)
    known = [site for place in places for site in place.sites]
    instead = "retrain it without, or build the Hugging Face model (base.kind: transformers)"
    refuse_features(headers, "an ONNX graph (base.kind: onnx)", instead)
    ranks = [
        {site: header.modules[module].rank for site, module in _match(header, known, file).items()}
        for header in headers
    ]
    used = {site for rank in ranks for site in rank}
    if spec.sites is not None:
        inner = [site for site in known if not _is_output_layer(site)]
        used = named_sites(spec, known, inner)
    groups: dict[ir.Value | None, list[Place]] = {}
    for place in places:
        if used & set(place.sites):
            for product in place.products:
                _check_dtype(product, spec.export.dtype, file)
            groups.setdefault(place.products[0].node.inputs[0], []).append(place)
    layers, outputs = [], {}
    for group in groups.values():
        widths = {site: width for place in group for site, width in place.sites.items()}
        layer = site_layer(widths, group[0].products[0].in_features, "linear", max_rank)
        rows = true_rows(layer, ranks, spec) if generates else None
        layers.append(make_layer_plan(layer, (), False, spec, num_slots, slot_rows=rows))
        outputs[layer.name] = tuple(one.output for place in group for one in place.products)
    return tuple(layers), GraphPlan(directory, file, outputs, read_facts(directory))


def _match(header: AdapterHeader, sites: Iterable[str], file: Path) -> dict[str, str]:
    try:
        return match_sites(header, set(sites))
    except AdapterWeightsError as error:
        raise AdapterWeightsError(
            f"{error}. The base is {file}: where it has a product for a module under another name,"
            " name it under base.sites: {node: …, site: …}"
        ) from error


def _is_output_layer(site: str) -> bool:
    parts = site.split(".")
    return parts[0] in _OUTPUT_LAYERS or parts[-1] in _OUTPUT_LAYERS


def _check_dtype(product: Product, dtype: str, file: Path) -> None:
    """The graph computes in the dtype of its weights, or of a quantized weight's scales."""
    holder = product.node.inputs[2] if product.node.op_type == "MatMulNBits" else product.weight
    known = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
    kind = holder.dtype.name if holder is not None and holder.dtype is not None else "nothing"
    found = known.get(kind, kind.lower())
    if found != dtype:
        raise BaseModelError(
            f"{file}: node {product.node.name!r} computes in {found}; export.dtype is {dtype}, and"
            " has to be the graph's own"
        )
