"""The sites of an ONNX graph that exists. No weight is read, and no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.sites import match_sites
from loraexport_runtime.contract.genai_config import check_cache, read_genai_config
from loraexport_runtime.contract.kinds import Facts, Tag
from loraexport_runtime.contract.naming import Naming
from loraexport_runtime.contract.onnx_file import read_onnx
from loraexport_runtime.errors import AdapterWeightsError

from ..errors import BaseModelError
from ..graphs.files import other_files, read_graph, require_data
from ..graphs.inputs import input_entry
from ..graphs.places import Place, find_places
from ..graphs.products import Product, count_quantized, list_products
from ..hf.facts import read_facts
from ..hf.names.naming import GENAI_TYPES, read_naming
from ..hf.tokenizer import find_files, require_tokenizer
from ..spec.schema import OnnxSpec, Spec
from .layer import LayerPlan, make_layer_plan, refuse_features
from .sites import named_sites, site_layer

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
    naming: Naming


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
    model = read_graph(file)
    require_data(model, file)
    if generates:
        other_files(model, file, directory)
        require_tokenizer(directory)
    else:
        find_files(directory)  # which refuses what a build could not copy
    graph = model.graph
    products, num_quantized = list_products(graph), count_quantized(graph)
    if not products:
        raise BaseModelError(f"{file}: no product of a weight of floats; {_advice(num_quantized)}")
    config = read_genai_config(directory, BaseModelError)["model"] if generates else None
    if config is not None:
        check_cache(config, read_onnx(file, BaseModelError), directory, BaseModelError)
    for value in () if generates else graph.inputs:
        input_entry(value, str(file))  # which refuses what a build could not prove
    modules = {module for header in headers for module in header.modules}
    places = find_places(products, base.sites, config, modules, file)
    sites = [site for place in places for site in place.sites]
    instead = "retrain it without, or build the Hugging Face model (base.kind: transformers)"
    refuse_features(headers, "an ONNX graph (base.kind: onnx)", instead)
    genai_type = None if config is None else config.get("type")
    architecture = genai_type if genai_type in GENAI_TYPES else None
    naming = read_naming(directory, sites, headers, architecture)
    if generates:  # its builder calls every decoder's layers model.layers, whatever they were
        naming = replace(naming, prefixes=tuple(dict.fromkeys((*naming.prefixes, "model"))))
    matches = [(header, _match(header, sites, naming, file, num_quantized)) for header in headers]
    used = {site for _, matched in matches for site in matched}
    if spec.sites is not None:
        inner = [site for site in sites if not _is_output_layer(site)]
        used = named_sites(spec, sites, inner)
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
        layers.append(make_layer_plan(layer, (), False, spec, num_slots))
        outputs[layer.name] = tuple(product.output for place in group for product in place.products)
    return tuple(layers), GraphPlan(directory, file, outputs, read_facts(directory), naming)


def _match(
    header: AdapterHeader,
    sites: Iterable[str],
    naming: Naming,
    file: Path,
    num_quantized: int,
) -> dict[str, str]:
    try:
        return match_sites(header, set(sites), naming)
    except AdapterWeightsError as error:
        if num_quantized:
            raise AdapterWeightsError(f"{error}. In {file} {_advice(num_quantized)}") from error
        raise AdapterWeightsError(
            f"{error}. The base is {file}: where it has a product for a module under another name,"
            " name it under base.sites: {node: …, site: …}"
        ) from error


def _advice(num_quantized: int) -> str:
    """What to do about a graph without the products that LoRA needs."""
    if num_quantized:
        return (
            f"its {num_quantized} products take integers of 8 bits (a graph that was quantized, as"
            " optimum's and onnxruntime's quantizers write it), which LoRA cannot join. Give the"
            " graph as it was before"
        )
    return "LoRA joins MatMul, Gemm and MatMulNBits nodes; give the graph of a model that has them"


def _is_output_layer(site: str) -> bool:
    parts = site.split(".")
    return parts[0] in _OUTPUT_LAYERS or parts[-1] in _OUTPUT_LAYERS


def _check_dtype(product: Product, dtype: str, file: Path) -> None:
    """The graph computes in the dtype of its weights, or of a quantized weight's scales."""
    holder = product.node.inputs[2] if product.node.op_type == "MatMulNBits" else product.weight
    names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
    kind = holder.dtype.name if holder is not None and holder.dtype is not None else "nothing"
    product_dtype = names.get(kind, kind.lower())
    if product_dtype != dtype:
        raise BaseModelError(
            f"{file}: node {product.node.name!r} computes in {product_dtype}; export.dtype is"
            f" {dtype}, and has to be the graph's own"
        )
