"""ONNX files and their external data: read, and written after a graft."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import onnx_ir as ir

from loraexport_runtime.contract.foreign import require_file
from loraexport_runtime.contract.onnx_file import read_onnx
from loraexport_runtime.errors import quoted

from ..errors import BaseModelError
from ..hf.folder import is_within, require_copyable, require_plain_files

_INLINE = 256
"""Bytes of a tensor below which it stays in the graph's own file."""


def external_files(model: ir.Model, file: Path) -> set[Path]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return {
        file.parent / tensor.location for tensor in tensors if isinstance(tensor, ir.ExternalTensor)
    }


def require_data(model: ir.Model, file: Path) -> None:
    """Raise BaseModelError unless each file of external data is whole, by its size."""
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


def other_files(model: ir.Model, file: Path, directory: Path) -> list[Path]:
    """What lies in a graph's directory, but for its weights and other graphs.

    Raises:
        BaseModelError: one of them cannot be copied.
    """
    require_plain_files(directory)
    skipped = {file, *external_files(model, file)}
    files = [
        other
        for other in sorted(directory.iterdir())
        if other.is_file() and other not in skipped and other.suffix != ".onnx"
    ]
    for other in files:
        require_copyable(other)
    return files


def save_grafted(
    model: ir.Model, path: Path, stacks: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a graph, its weights in one file beside it, and there every stack, however small: the
    runtime reads the base's rows from it."""
    least = min([_INLINE, *(values.nbytes for values in (stacks or {}).values())])
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=least)


def rounds_activations(file: Path) -> bool:
    """Whether products of a graph take activations rounded to 8 bits, as int4 bases may."""
    nodes = (node for node in ir.load(file).graph if node.op_type == "MatMulNBits")
    return any(node.attributes.get_int("accuracy_level", 0) == 4 for node in nodes)


def read_graph(file: Path) -> ir.Model:
    """An ONNX file; its external data is not read yet.

    Raises:
        BaseModelError: there is none, it is damaged, or keeps weights outside its folder.
    """
    hint = "base.file names the graph in base.path"
    for location in sorted(read_onnx(file, BaseModelError, hint).locations):
        _require_inside(file, location)
    try:
        return ir.load(file)
    except Exception as error:  # protobuf's own, which is no dependency of ours
        raise BaseModelError(f"{file}: not readable as ONNX: {error}") from error


def _require_inside(file: Path, location: str) -> None:
    """Raise BaseModelError unless external data of a graph is a regular file in its folder."""
    pure, data = PurePosixPath(location), file.parent / location
    unsafe = not location or "\0" in location or pure.is_absolute() or ".." in pure.parts
    try:
        # OSError: a name that is too long. RuntimeError: links that lead in a circle.
        unsafe = unsafe or not is_within(data.resolve(), file.parent)
    except (OSError, RuntimeError):
        unsafe = True
    if unsafe:
        raise BaseModelError(
            f"{file}: it keeps weights in {quoted(location)}, which is not in its folder, so"
            " nothing is read from it; save the graph again with its data beside it"
        )
    require_file(data, BaseModelError, f"{file.name} keeps weights in it; copy it too")
