"""SegmentedLayer -> a TorchScript file: the scripted loop inside the traced module.

The number of segments stays dynamic. The file holds no example inputs and no source paths.
"""

import warnings
from pathlib import Path

import torch

from loraexport_runtime.manifest import Layer

from ..errors import ExportError
from ..lora.segmented import SegmentedLayer, add_segmented_lora
from .example import example_inputs

_LEFT_OUT = ("traced_inputs", ".debug_pkl")


def export_torchscript(layer: Layer, module: SegmentedLayer, dtype: str, path: Path) -> None:
    """Trace a layer and write `path`.

    Graph inputs: x [num_tokens, in] (or ids int64 [num_tokens]) on any device, seg_indptr int64
    [n + 1] and seg_slots int64 [n] on the CPU; output y [num_tokens, out].
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit announces its end
            module.lora.loop = torch.jit.script(add_segmented_lora)
            traced = torch.jit.trace(  # type: ignore[no-untyped-call]
                module, example_inputs(layer, dtype), check_trace=False
            )
            traced.save(str(path))
    except RuntimeError as error:
        raise ExportError(f"layer {layer.name!r}: torch.jit.trace failed: {error}") from error
    finally:
        module.lora.loop = add_segmented_lora
    _strip(path)


def _strip(path: Path) -> None:
    """Rewrite the archive without the example inputs and the source ranges that torch adds."""
    reader = torch._C.PyTorchFileReader(str(path))
    records = [
        (name, reader.get_record(name))
        for name in reader.get_all_records()
        if not any(mark in name for mark in _LEFT_OUT) and not name.startswith(".data/")
    ]
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, data in records:
        if name not in ("version", "byteorder"):
            writer.write_record(name, data, len(data))
    writer.write_end_of_file()
