"""What onnxruntime makes of a graph: the operators that are left once it has optimized it."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort

CPU = ["CPUExecutionProvider"]


def open_optimized(path: Path) -> tuple[ort.InferenceSession, Counter[str]]:
    """A plain session on the CPU, and how often each operator is in its graph."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = ort.InferenceSession(path, options, CPU)
        graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
    return session, Counter(node.op_type for node in graph.node)
