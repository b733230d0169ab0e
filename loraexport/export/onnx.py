"""A layer's module -> an ONNX file whose stacks are overridable initializers.

Inputs: x [num_tokens, in] (or ids), seg_indptr, seg_slots; output y. Every node and value is named
`<layer>/<role>/<operator>`, the role being the module's place in the layer (base, lora/shrink, …).
"""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass

from loraexport_runtime.manifest import Layer

from ..bases.layers import LayerModules
from ..errors import ExportError
from ..tensors import to_torch
from .example import example_inputs

OPSET = 23
EXTERNAL_DATA_FROM = 1 << 30
"""Bytes of initializers from which on they go to a file beside the graph (protobuf: 2 GiB)."""


def export_onnx(modules: LayerModules, dtype: str, path: Path) -> None:
    """Export a layer and write `path`, with `path`.data beside it from 1 GiB on.

    Raises:
        ExportError: torch could not export the module.
    """
    layer = modules.layer
    model = _trace(layer, modules, dtype)
    _name_by_role(model.graph, layer)
    _make_overridable(model.graph, modules.stacks)
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "loraexport", ""
    model.graph.name = layer.name
    NameFixPass()(model)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = f"{path.name}.data" if size >= EXTERNAL_DATA_FROM else None
    ir.save(model, path, external_data=external)


def _trace(layer: Layer, modules: LayerModules, dtype: str) -> ir.Model:
    tokens = torch.export.Dim("num_tokens", min=1)
    segments = torch.export.Dim("num_segments", min=1)
    stacks = [to_torch(modules.stacks[stack.name]) for stack in layer.stacks]
    x_shape = {0: tokens}
    try:
        with warnings.catch_warnings(), _quiet_torch(), torch.no_grad():
            warnings.simplefilter("ignore")  # they speak of torch's own code, not of ours
            program = torch.onnx.export(
                modules.stacked,
                (*example_inputs(layer, dtype), *stacks),
                dynamo=True,
                opset_version=OPSET,
                input_names=[
                    layer.input_name,
                    "seg_indptr",
                    "seg_slots",
                    *(stack.name for stack in layer.stacks),
                ],
                output_names=["y"],
                dynamic_shapes=(x_shape, {0: segments + 1}, {0: segments}, None, None),
                verbose=False,
            )
    except Exception as error:
        raise ExportError(f"layer {layer.name!r}: torch.onnx.export failed: {error}") from error
    assert program is not None, "export gives a program unless told to write a file"
    return program.model


def _name_by_role(graph: ir.Graph, layer: Layer) -> None:
    """Name nodes and values after the layer and the module that they come from."""
    counts: Counter[str] = Counter()
    kept = {id(value) for value in (*graph.inputs, *graph.outputs)}

    def unique(stem: str) -> str:
        counts[stem] += 1
        return stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"

    for name, value in list(graph.initializers.items()):
        if id(value) not in kept:
            del graph.initializers[name]
            known = re.fullmatch(r"(base|lora)\..*", name)
            value.name = unique(f"{layer.name}.{name}" if known else f"{layer.name}/constant")
            graph.initializers[value.name] = value
    for node in graph:
        stem = f"{layer.name}/{_role(node)}{node.op_type.lower()}"
        node.name = unique(stem)
        for index, value in enumerate(node.outputs):
            if id(value) not in kept:
                value.name = node.name if index == 0 else f"{node.name}:{index}"


def _role(node: ir.Node) -> str:
    """`base/` or `lora/shrink/`: the path of the module whose forward made the node."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    # The last entry is the operator's own name in the exported program.
    paths = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
    return paths[-1].replace(".", "/") + "/" if paths else ""


def _make_overridable(graph: ir.Graph, stacks: Mapping[str, np.ndarray]) -> None:
    """Give each stack, an input so far, its initial value: then it need not be fed, but may be."""
    for value in graph.inputs:
        if value.name is not None and value.name in stacks:
            value.const_value = ir.Tensor(stacks[value.name], name=value.name)
            graph.register_initializer(value)


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """The exporter logs which optional packages it does not find; nobody can act on that here."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
