"""The slots of a session -> `.onnx_adapter` files, for services on onnxruntime's own LoraAdapter.

A C++ or C# service loads the file of its graph once, and passes it to every run:

    Ort::LoraAdapter slots = Ort::LoraAdapter::CreateLoraAdapter(path, nullptr);
    run_options.AddActiveLoraAdapter(slots);

The file holds the whole stacks, every slot side by side, so one active adapter serves a mixed
batch: `seg_slots` (or `adapter_ids`) chooses the slot of each row, as `slots.json` numbers them.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from ..device.memory import host_value

SLOTS_FILE = "slots.json"
SUFFIX = ".onnx_adapter"


def write_onnx_adapters(
    folder: Path,
    graphs: Mapping[str, Mapping[str, np.ndarray]],
    slots: Mapping[str, int],
) -> None:
    """Write `<graph>.onnx_adapter` for each graph, then `slots.json`: adapter name -> slot.

    A file's parameters are named as the graph's overridable inputs. onnxruntime refuses names that
    the graph does not have, so each graph has a file of its own. Every file is replaced as a whole:
    a service that has mapped the old one keeps it.

    Active adapters override fed values silently, and only `Run` knows them: with IO binding
    onnxruntime ignores them, so bind the parameters of `AdapterFormat.read_adapter` instead.

    Args:
        graphs: graph name -> stack name -> values `[rows, width]`.
        slots: what the stacks hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for graph, stacks in graphs.items():
        file = ort.AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        file.set_parameters(
            {name: host_value(value, value.dtype.name) for name, value in stacks.items()}
        )
        _replace(folder / f"{graph}{SUFFIX}", file.export_adapter)
    text = json.dumps(dict(slots), indent=2, ensure_ascii=False) + "\n"
    _replace(folder / SLOTS_FILE, lambda path: Path(path).write_text(text, encoding="utf-8"))


def _replace(target: Path, write: Callable[[str], object]) -> None:
    """Write beside the target, then switch: nobody sees half a file."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as staging:
        staged = Path(staging) / target.name
        write(str(staged))
        os.replace(staged, target)
