"""`kind: onnx`: a graph that exists. What it takes and gives is seen by running it."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from loraexport_runtime.adapters.tensor_files import digest_array
from loraexport_runtime.contract.files import digest_file
from loraexport_runtime.contract.foreign import require_file

from ..errors import BaseModelError
from ..graphs.files import external_files, read_graph
from ..graphs.products import Graft, Layout, list_products, make_graft
from ..plan.plan import Plan
from .weights import Base, digest_of


def load_base(plan: Plan) -> Base:
    """The digests of a graph's files and of its sites' weights, as they are stored."""
    assert plan.graph is not None, "the plan is of a graph"
    model = read_graph(plan.graph.file)
    _require_data(model, plan.graph.file)
    by_output = {one.output: one for one in list_products(model.graph)}
    digests = {}
    for planned in plan.layers:
        products = [by_output[output] for output in plan.graph.products[planned.layer.name]]
        stored = {one.output: digest_array(_values(one.weight)) for one in products}
        for part in planned.layer.slices:
            digests[part.site] = digest_of(stored | {"columns": f"{part.offset}, {part.width}"})
    files = sorted({plan.graph.file, *external_files(model, plan.graph.file)})
    return Base({}, digests, digest_of({file.name: digest_file(file) for file in files}))


def _require_data(model: ir.Model, file: Path) -> None:
    """Raise BaseModelError unless each file of external data is there and whole."""
    for data in sorted(external_files(model, file)):
        require_file(data, BaseModelError, f"{file.name} keeps weights in it; copy it too")
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
            size = (file.parent / tensor.location).stat().st_size
            if size < end:
                raise BaseModelError(
                    f"{file.parent / tensor.location}: {size} bytes, but {value.name!r} of"
                    f" {file.name} ends at {end}; copy or download it again"
                )


def load_graph(plan: Plan, folder: Path) -> ir.Model:
    """The graph in memory; of a generator, its config and tokenizer are copied to `folder`."""
    assert plan.graph is not None, "the plan is of a graph"
    model = read_graph(plan.graph.file)
    skipped = {plan.graph.file, *external_files(model, plan.graph.file)}
    try:
        ir.external_data.load_to_model(model)
    except Exception as error:
        raise BaseModelError(f"{plan.graph.file}: its external data is damaged: {error}") from error
    if plan.graph.generates:
        folder.mkdir(exist_ok=True)
        for file in sorted(plan.graph.directory.iterdir()):
            if file.is_file() and file not in skipped and file.suffix != ".onnx":
                shutil.copyfile(file, folder / file.name)
    return model


def find_sites(
    plan: Plan, model: ir.Model, layouts: Mapping[str, tuple[Layout, int]]
) -> list[Graft]:
    """The products of every layer of the plan."""
    assert plan.graph is not None, "the plan is of a graph"
    by_output = {one.output: one for one in list_products(model.graph)}
    grafts = []
    for planned in plan.layers:
        layer = planned.layer
        products = [by_output[output] for output in plan.graph.products[layer.name]]
        layout: Layout = "flat" if products[0].node.op_type == "Gemm" else "batched"
        grafts.append(make_graft(layer, products, *layouts.get(layer.name, (layout, 0))))
    return grafts


def _values(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None, "an initializer has a value"
    return value.const_value.numpy()
