"""ONNX files and their external data: read, and written after a graft."""

from pathlib import Path

import onnx_ir as ir

from loraexport_runtime.contract.foreign import require_file

from ..errors import BaseModelError


def external_files(model: ir.Model, file: Path) -> set[Path]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {
        file.parent / tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)
    }


def save_grafted(model: ir.Model, path: Path) -> None:
    """Write a graph, its weights in one file beside it."""
    ir.save(model, path, external_data=f"{path.name}.data")


def read_graph(file: Path) -> ir.Model:
    """An ONNX file; its external data is not read yet.

    Raises:
        BaseModelError: there is none, or it is damaged.
    """
    require_file(file, BaseModelError, "base.file names the graph in base.path")
    try:
        return ir.load(file)
    except Exception as error:  # protobuf's own, which is no dependency of ours
        raise BaseModelError(f"{file}: not readable as ONNX: {error}") from error
