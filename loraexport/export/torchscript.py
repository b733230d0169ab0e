"""SegmentedLayer -> a TorchScript file: the scripted loop inside the traced module.

The number of segments stays dynamic. The file holds no example inputs and no source paths.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Layer

from ..errors import ExportError
from ..hf.quiet import quiet_models
from ..lora.segmented import SegmentedLayer, add_segmented_lora
from ..tensors import to_torch
from .example import example_inputs, example_weights, model_label, try_example_rows

if TYPE_CHECKING:  # transformers is for whole models only
    from ..bases.model import ModelModules

_LEFT_OUT = ("traced_inputs", ".debug_pkl")


def export_torchscript(layer: Layer, module: SegmentedLayer, dtype: str, path: Path) -> None:
    """Trace a layer and write `path`.

    Graph inputs: x [num_tokens, in] (or ids int64 [num_tokens]) on any device, seg_indptr int64
    [n + 1] and seg_slots int64 [n] on the CPU; output y [num_tokens, out].
    """
    try:
        with _quiet_jit():
            module.lora.loop = torch.jit.script(add_segmented_lora)
        _trace(module, example_inputs(layer, dtype), f"layer {layer.name!r}", path)
    finally:
        module.lora.loop = add_segmented_lora


def export_model_torchscript(modules: "ModelModules", name: str, path: Path) -> None:
    """Trace a whole model and write `path`; it holds its stacks.

    Graph inputs, by position: the model's own as the manifest lists them, adapter_ids [batch], and
    with a blend adapter_weights [batch, slots].

    Raises:
        BaseModelError: the model does not run with multi-LoRA sites.
        ExportError: torch could not trace it.
    """
    inputs, adapter_ids = try_example_rows(name, modules)
    label = model_label(name, modules)
    arguments = (*inputs.values(), adapter_ids)
    if modules.blend_slots is not None:
        arguments = (*arguments, example_weights(adapter_ids, modules.blend_slots))
    _trace(_WithOwnStacks(modules).eval(), arguments, label, path)


class _WithOwnStacks(nn.Module):
    """The model with its stacks as buffers and its inputs by position."""

    def __init__(self, modules: "ModelModules") -> None:
        super().__init__()
        self.module = modules.module
        self._names = [entry.name for entry in modules.signature.inputs]
        for index, value in enumerate(modules.stacks.values()):
            self.register_buffer(f"stack{index}", to_torch(value))
        self._num_stacks = len(modules.stacks)

    def forward(self, *arguments: Tensor) -> Tensor:
        stacks = [getattr(self, f"stack{index}") for index in range(self._num_stacks)]
        inputs = dict(zip(self._names, arguments, strict=False))
        adapter_ids, *weights = arguments[len(self._names) :]
        return self.module(inputs, adapter_ids, stacks, *weights)


def _trace(module: nn.Module, arguments: tuple[Tensor, ...], label: str, path: Path) -> None:
    try:
        with _quiet_jit(), torch.no_grad():
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                module, arguments, check_trace=False
            )
            # In memory: where a disk is full, torch's own writer ends the process.
            written = io.BytesIO()
            torch.jit.save(traced, written)
    except Exception as error:
        raise ExportError(f"{label}: torch.jit.trace failed: {str(error).strip()}") from error
    path.write_bytes(_strip(written.getvalue()))


@contextmanager
def _quiet_jit() -> Iterator[None]:
    with quiet_models(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit announces its end
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


def _strip(archive: bytes) -> bytes:
    """The archive without example inputs, source ranges, and a device of its own."""
    reader: Any = torch._C.PyTorchFileReader(io.BytesIO(archive))
    records = [
        (name, reader.get_record(name))
        for name in reader.get_all_records()
        if not any(mark in name for mark in _LEFT_OUT) and not name.startswith(".data/")
    ]
    # Operators are read as of this version; a new archive alone would say the oldest.
    record = next(name for name in reader.get_all_records() if name.endswith("version"))
    version = int(reader.get_record(record))
    stripped = io.BytesIO()
    writer: Any = torch._C.PyTorchFileWriter(stripped)
    writer.set_min_version(version)
    for name, data in records:
        if name.endswith(".py"):
            data = _follow_device(data.decode()).encode()
        if name not in ("version", "byteorder"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
    return stripped.getvalue()


def _follow_device(code: str) -> str:
    """Make what a forward creates live where its first tensor does.

    Tracing writes the device it ran on into every arange and zeros, so the graph would fail on
    another one.
    """
    functions = re.split(r"(?m)^(?=\s*def )", code)
    for index, function in enumerate(functions):
        tensor = re.search(r"(\w+): Tensor", function)
        if tensor:
            device = f"ops.prim.device({tensor[1]})"
            functions[index] = function.replace('torch.device("cpu")', device)
    return "".join(functions)
