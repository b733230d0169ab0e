"""A graph that exists: its digests, its weights in memory, its products."""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from loraexport_runtime.adapters.tensor_files import digest_array
from loraexport_runtime.contract.files import digest_file

from ..errors import BaseModelError
from ..graphs.files import external_files, read_graph
from ..graphs.products import Graft, Layout, list_products, make_graft
from ..plan.graph import GraphPlan
from ..plan.plan import AnyPlan
from .weights import Base, digest_of

_WEIGHT, _OUTPUT = ".weight", "lm_head"
NO_PLAIN_MODEL = "the base is an ONNX graph"
"""Why no Hugging Face model can be asked."""


def load_graph_base(plan: AnyPlan, graph: GraphPlan) -> Base:
    """The digests of a graph's files and of its sites' weights, as they are stored."""
    model = read_graph(graph.file)
    by_output = {product.output: product for product in list_products(model.graph)}
    digests = {}
    for planned in plan.layers:
        products = [by_output[output] for output in graph.products[planned.layer.name]]
        stored = {product.output: digest_array(_values(product.weight)) for product in products}
        for part in planned.layer.slices:
            digests[part.site] = digest_of(stored | {"columns": f"{part.offset}, {part.width}"})
    digests = _embeddings(model.graph) | digests
    files = {graph.file, *external_files(model, graph.file)}
    return Base({}, digests, digest_of({file.name: digest_file(file) for file in sorted(files)}))


def _embeddings(graph: ir.Graph) -> dict[str, str]:
    """The digests of word tables and of an output layer, by module, as PEFT would save them."""
    tables = [node.inputs[0] for node in graph if node.op_type == "Gather"]
    digests = {
        str(table.name).removesuffix(_WEIGHT): digest_array(_values(table))
        for table in tables
        if table is not None and table.const_value is not None
        if str(table.name).endswith(_WEIGHT) and len(table.const_value.shape) == 2
    }
    for product in list_products(graph):
        is_plain = product.node.op_type == "MatMul" and product.node.inputs[1] is product.weight
        if is_plain and product.names and product.names[0].rpartition(".")[2] == _OUTPUT:
            digests[product.names[0]] = digest_array(_values(product.weight).T)
    return digests


def load_graph(graph: GraphPlan) -> ir.Model:
    """The graph with all its weights in memory.

    Raises:
        BaseModelError: it cannot be read.
    """
    model = read_graph(graph.file)
    try:
        ir.external_data.load_to_model(model)
    except Exception as error:
        raise BaseModelError(f"{graph.file}: its external data is damaged: {error}") from error
    return model


def find_sites(
    plan: AnyPlan,
    graph: GraphPlan,
    model: ir.Model,
    layouts: Mapping[str, tuple[Layout, int]],
) -> list[Graft]:
    """The products of every layer of the plan.

    Args:
        layouts: of the layers whose rows do not lie as the operator says.
    """
    by_output = {product.output: product for product in list_products(model.graph)}
    grafts = []
    for planned in plan.layers:
        layer = planned.layer
        products = [by_output[output] for output in graph.products[layer.name]]
        layout: Layout = "flat" if products[0].node.op_type == "Gemm" else "batched"
        grafts.append(make_graft(layer, products, *layouts.get(layer.name, (layout, 0))))
    return grafts


def _values(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None, "an initializer has a value"
    return value.const_value.numpy()
