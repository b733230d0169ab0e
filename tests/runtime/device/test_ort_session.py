"""Sessions over a caller's initializers: a name that the graph lacks would be ignored."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from loraexport_runtime import ArtifactError
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.ort_session import open_session

GRAPH = "graphs/up.onnx"
CPU = [("CPUExecutionProvider", {})]


def stacks_of(folder: Path) -> dict[str, np.ndarray]:
    """Zeros in the shape of every stack of the layer `up`."""
    (layer,) = (layer for layer in Manifest.read(folder).layers if layer.name == "up")
    return {stack.name: np.zeros(stack.shape, np.float32) for stack in layer.stacks}


def opened(folder: Path, stacks: dict[str, np.ndarray]) -> ort.InferenceSession:
    values = {name: ort.OrtValue.ortvalue_from_numpy(stack) for name, stack in stacks.items()}
    return open_session(folder / GRAPH, CPU, values, threads=1)


def test_stacks_of_the_graph(tenants: Path) -> None:
    assert opened(tenants, stacks_of(tenants)).get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("change", ["name", "shape", "dtype"])
def test_an_initializer_that_the_graph_lacks(tenants: Path, change: str) -> None:
    stacks = stacks_of(tenants)
    name, stack = stacks.popitem()
    if change == "name":
        stacks[f"{name}x"] = stack
    else:
        stacks[name] = stack[1:] if change == "shape" else stack.astype(np.float16)
    text = "it has no initializer .*, so that loaded adapters would have no effect; build the"
    with pytest.raises(ArtifactError, match=text):
        opened(tenants, stacks)
