"""A module -> an ONNX file whose stacks are overridable initializers.

A layer takes x [num_tokens, in] (or ids), seg_indptr and seg_slots, and gives y; a model takes its
own inputs and adapter_ids [batch]. Every node and value is named `<graph>/<role>/<operator>`, the
role being the place of its module (base, lora/shrink, …).
"""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass
from torch import nn

from loraexport_runtime.contract.kinds import ADAPTER_WEIGHTS
from loraexport_runtime.contract.manifest import Function, Layer

from ..bases.layers import LayerModules
from ..errors import ExportError
from ..hf.quiet import quiet_models
from ..tensors import to_torch
from .example import example_inputs, example_weights, model_label, try_example_rows
from .fuse import fuse
from .outline import outline

if TYPE_CHECKING:  # transformers is for whole models only
    from ..bases.model import ModelModules

OPSET = 23
EXTERNAL_DATA_FROM = 1 << 30
"""Bytes of initializers from which on they go to a file beside the graph (protobuf: 2 GiB)."""

_TABLES: dict[int, Any] = {}
"""Of torch.onnx, which only reads them: by opset, what its functions are written as."""


@dataclass(frozen=True)
class _Graph:
    """What `torch.onnx.export` needs to know of a module, and what its stacks hold."""

    name: str
    label: str
    """The name in errors."""
    module: nn.Module
    arguments: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]
    stacks: Mapping[str, np.ndarray]


def export_onnx(
    modules: LayerModules, dtype: str, path: Path, outlined_slots: int | None = None
) -> dict[str, Function]:
    """Export a layer and write `path`, with `path`.data beside it from 1 GiB on.

    Args:
        outlined_slots: of the stacks, where the LoRA part is to be a call of a function.

    Returns:
        Layer -> the function that it calls, if it does.

    Raises:
        ExportError: torch could not export the module.
    """
    layer = modules.layer
    tokens = torch.export.Dim("num_tokens", min=1)
    segments = torch.export.Dim("num_segments", min=1)
    stacks = [to_torch(modules.stacks[stack.name]) for stack in layer.stacks]
    names = [layer.input_name, "seg_indptr", "seg_slots", *modules.stacks]
    shapes = ({0: tokens}, {0: segments + 1}, {0: segments}, None, None)
    arguments = (*example_inputs(layer, dtype), *stacks)
    graph = _Graph(
        name=layer.name,
        label=f"layer {layer.name!r}",
        module=modules.stacked,
        arguments=arguments,
        dynamic_shapes=shapes,
        input_names=names,
        output_names=["y"],
        stacks=modules.stacks,
    )
    return _export(graph, path, [layer], outlined_slots)


def export_model_onnx(
    modules: "ModelModules", name: str, path: Path, outlined_slots: int | None = None
) -> dict[str, Function]:
    """Export a whole model likewise. Inputs: the model's own, adapter_ids, and the stacks; with a
    blend adapter_weights [batch, slots], which need not be fed either.

    Raises:
        BaseModelError: the model does not run with multi-LoRA sites.
        ExportError: torch could not export it.
    """
    inputs, adapter_ids = try_example_rows(name, modules)
    dynamic = {size: torch.export.Dim(size, min=1) for size in ("batch", "sequence")}
    stacks = [to_torch(value) for value in modules.stacks.values()]
    input_shapes = {
        entry.name: {at: dynamic[size] for at, size in enumerate(entry.shape) if size in dynamic}
        for entry in modules.signature.inputs
    }
    shapes: tuple[Any, ...] = (input_shapes, {0: dynamic["batch"]}, [None] * len(stacks))
    names = [*inputs, "adapter_ids", *modules.stacks]
    outputs = [entry.name for entry in modules.signature.outputs]
    arguments: tuple[Any, ...] = (inputs, adapter_ids, stacks)
    defaults = {}
    if modules.blend_slots is not None:
        arguments = (*arguments, example_weights(adapter_ids, modules.blend_slots))
        shapes, names = (*shapes, {0: dynamic["batch"]}), [*names, ADAPTER_WEIGHTS]
        defaults[ADAPTER_WEIGHTS] = np.zeros((1, modules.blend_slots), np.float32)
    graph = _Graph(
        name=name,
        label=model_label(name, modules),
        module=modules.module,
        arguments=arguments,
        dynamic_shapes=shapes,
        input_names=names,
        output_names=outputs,
        stacks={**modules.stacks, **defaults},
    )
    return _export(graph, path, modules.layers, outlined_slots)


def _export(
    graph: _Graph, path: Path, layers: Sequence[Layer], outlined_slots: int | None
) -> dict[str, Function]:
    model = _trace(graph)
    fuse(model)
    found: dict[str, Function] = {}
    if outlined_slots is not None:
        found = outline(model, layers, outlined_slots, graph.stacks)
    _name_by_role(model.graph, graph.name)
    stacks = {name: ir.Tensor(array, name=name) for name, array in graph.stacks.items()}
    make_overridable(model.graph, stacks)
    ClearMetadataAndDocStringPass()(model)
    model.producer_name, model.producer_version = "loraexport", ""
    model.graph.name = graph.name
    NameFixPass()(model)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = f"{path.name}.data" if size >= EXTERNAL_DATA_FROM else None
    ir.save(model, path, external_data=external)
    return found


def _trace(graph: _Graph) -> ir.Model:
    return export_program(
        graph.label,
        graph.module,
        graph.arguments,
        graph.dynamic_shapes,
        input_names=graph.input_names,
        output_names=graph.output_names,
    )


def export_program(
    label: str,
    module: nn.Module,
    arguments: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    opset: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ir.Model:
    """torch.onnx.export, quietly.

    Raises:
        ExportError: with what went wrong at first; `label` says where.
    """
    try:
        with quiet_models(), warnings.catch_warnings(), torch.no_grad(), _one_table():
            warnings.simplefilter("ignore")  # they speak of torch's own code, not of ours
            program = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=dynamic_shapes,
                verbose=False,
                input_names=input_names,
                output_names=output_names,
            )
    except Exception as error:
        raise ExportError(f"{label}: torch.onnx.export failed: {_first_cause(error)}") from error
    assert program is not None, "export gives a program unless told to write a file"
    return program.model


@contextmanager
def _one_table() -> Iterator[None]:
    """Have torch.onnx make its table of functions once: it makes one for each graph, in 0.4 s."""
    exporter = sys.modules.get("torch.onnx._internal.exporter._registration")
    registry: Any = getattr(exporter, "ONNXRegistry", None)
    make = vars(registry).get("from_torchlib") if registry else None
    if make is None:  # torch's own affair, which the first export imports: slower, and as right
        yield
        return
    registry.from_torchlib = staticmethod(partial(_table_of, registry, make))
    try:
        yield
    finally:
        registry.from_torchlib = make


def _table_of(registry: Any, make: Any, opset_version: int) -> Any:
    if opset_version not in _TABLES:
        _TABLES[opset_version] = make.__get__(None, registry)(opset_version=opset_version)
    return _TABLES[opset_version]


def _first_cause(error: BaseException) -> str:
    """What went wrong at first, in one line: the exporter wraps it in advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _name_by_role(graph: ir.Graph, prefix: str) -> None:
    """Name nodes and values after the graph and the module that they come from."""
    counts: Counter[str] = Counter()
    fixed = {id(value) for value in (*graph.inputs, *graph.outputs)}

    def unique(stem: str) -> str:
        counts[stem] += 1
        return stem if counts[stem] == 1 else f"{stem}_{counts[stem]}"

    for name, value in list(graph.initializers.items()):
        if id(value) not in fixed:
            del graph.initializers[name]
            is_parameter = "." in name
            value.name = unique(f"{prefix}.{name}" if is_parameter else f"{prefix}/constant")
            graph.initializers[value.name] = value
    for node in graph:
        stem = f"{prefix}/{_role(node)}{node.op_type.lower()}"
        node.name = unique(stem)
        for index, value in enumerate(node.outputs):
            if id(value) not in fixed:
                value.name = node.name if index == 0 else f"{node.name}:{index}"


def _role(node: ir.Node) -> str:
    """`base/` or `lora/shrink/`: the path of the module whose forward made the node."""
    scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
    # The last entry is the operator's own name in the exported program.
    paths = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]
    return paths[-1].replace(".", "/") + "/" if paths else ""


def make_overridable(graph: ir.Graph, stacks: Mapping[str, ir.TensorProtocol]) -> None:
    """Give each stack, an input so far, its initial value: then it need not be fed, but may be."""
    for value in graph.inputs:
        if value.name == ADAPTER_WEIGHTS:
            # No weights for anyone, one row for the whole batch: by another name than `batch`, as
            # onnxruntime takes dimensions of one name to be equal.
            value.shape = ir.Shape(["weight_rows", stacks[ADAPTER_WEIGHTS].numpy().shape[1]])
        if value.name is not None and value.name in stacks:
            value.const_value = stacks[value.name]
            graph.register_initializer(value)
