"""A graph in plain onnxruntime."""

import tempfile
from pathlib import Path

import onnx_ir as ir
import onnxruntime as ort

from loraexport_runtime.device.providers import CPU, normalise_providers


def open_plain_onnx(path: Path, provider: str = CPU) -> ort.InferenceSession:
    """A graph without the runtime: its own stacks, as any onnxruntime session has them."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=normalise_providers([provider]))


def open_graph(model: ir.Model) -> ort.InferenceSession:
    """A graph in memory, on the CPU."""
    with tempfile.TemporaryDirectory() as folder:  # protobuf holds no more than 2 GiB
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        return open_plain_onnx(path)
