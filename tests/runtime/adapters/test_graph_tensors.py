"""A decoder's base in the stacks of its graph, read from the files beside it."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.decoders import make_prompts, write_tenants
from support.home import Home
from support.manifests import edit_manifest

import loraexport_runtime as lr
from loraexport_runtime.adapters.graph_tensors import GraphTensors
from loraexport_runtime.contract.listed import ListedFiles
from loraexport_runtime.contract.manifest import Manifest

GRAPH = "generator/model.onnx"


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    return home.artifact(write_tenants)


def test_the_first_rows_of_a_stack(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    whole = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load(artifact / GRAPH).graph.initializer
    }
    stacks = [stack for layer in manifest.layers for stack in layer.stacks if stack.row_offset]
    assert stacks
    with GraphTensors(ListedFiles(artifact, manifest.files)) as tensors:
        for stack in stacks:
            shape = (stack.row_offset, stack.shape[1])
            rows = tensors.read(GRAPH, stack.name, shape, np.dtype(np.float32))
            assert np.array_equal(rows, whole[stack.name][: stack.row_offset])
        with pytest.raises(lr.ArtifactError, match="no file beside it holds 'nothing'"):
            tensors.read(GRAPH, "nothing", (1, 1), np.dtype(np.float32))
        with pytest.raises(lr.ArtifactError, match="no file beside it holds"):
            tensors.read(GRAPH, stacks[0].name, (10**6, 10**3), np.dtype(np.float32))


def test_a_file_that_was_exchanged_is_not_read(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    manifest = Manifest.read(copy)
    (name, stack) = next((stack.name, stack) for layer in manifest.layers for stack in layer.stacks)
    data = bytearray((copy / f"{GRAPH}.data").read_bytes())
    data[-1] ^= 1
    (copy / f"{GRAPH}.data").write_bytes(data)
    with (
        GraphTensors(ListedFiles(copy, manifest.files)) as tensors,
        pytest.raises(lr.ArtifactError, match="its digest differs from the manifest's"),
    ):
        tensors.read(GRAPH, name, stack.shape, np.dtype(np.float32))


def test_slots_of_an_earlier_build_stay_as_they_are(artifact: Path, tmp_path: Path) -> None:
    """Their adapters generate as ever, from what the graph holds; others are refused."""
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)

    def fix(manifest: dict) -> None:  # type: ignore[type-arg]
        for layer in manifest["layers"]:
            for stack in layer["stacks"]:
                stack["slot_rows"] = [stack["rows_per_slot"]] * manifest["num_slots"]

    edit_manifest(copy, fix)
    prompts, names = make_prompts(9, 20, 5), ["first", "second", None]
    with lr.load_generator(artifact) as live, lr.load_generator(copy) as fixed:
        assert np.array_equal(fixed.greedy(prompts, names, 8), live.greedy(prompts, names, 8))
        with pytest.raises(lr.AdapterError, match="for no other; build it again to load more"):
            fixed.load_adapter("third", artifact.parents[1] / "more-0")
        fixed.unload_adapter("first")
        with pytest.raises(lr.UnknownAdapterError, match="'first' is not loaded"):
            fixed.greedy(prompts, names, 8)
