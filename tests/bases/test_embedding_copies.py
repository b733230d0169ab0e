"""Embeddings that PEFT saves beside a LoRA, as it does of a vocabulary that was resized: those that
equal the base's are taken, with PEFT's numbers, and others refused, in every kind of base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.builds import Project, write_model_project, write_small
from support.decoders import write_family
from support.home import Home

import loraexport_runtime
from loraexport.bases.adapters import load_adapters
from loraexport.bases.decoder import load_decoder_base
from loraexport.bases.graph import load_graph_base
from loraexport.bases.layers import load_layers_base
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.errors import AdapterWeightsError

WORDS = "embeddings.word_embeddings"
Change = Callable[[np.ndarray], np.ndarray]
DIFFERENT = r"\.weight', which differs from the weight of this base: the adapter was trained on"


def add(adapter: Path, copies: dict[str, np.ndarray], change: Change = np.copy) -> None:
    """Put weights of the base into an adapter's file, by their modules' names."""
    file = adapter / "adapter_model.safetensors"
    tensors = {f"base_model.model.{name}.weight": change(copy) for name, copy in copies.items()}
    save_file(load_file(file) | tensors, file)


def moved(weight: np.ndarray) -> np.ndarray:
    return weight + np.eye(*weight.shape, dtype=np.float32)


def longer(weight: np.ndarray) -> np.ndarray:
    return np.concatenate([weight, weight[:1]])


def write_resized(folder: Path) -> None:
    """A BERT, an adapter that carries its embeddings, and others that carry others."""
    write_model_project(folder, adapters=[{"name": "sql", "path": "sql"}])
    words = load_file(folder / "bert/model.safetensors")[f"{WORDS}.weight"]
    for name, change in (("moved", moved), ("longer", longer)):
        shutil.copytree(folder / "sql", folder / name)
        add(folder / name, {WORDS: words}, change)
    add(folder / "sql", {WORDS: words})


def test_of_a_whole_model(home: Home, tmp_path: Path) -> None:
    artifact = home.artifact(write_resized)
    manifest = Manifest.read(artifact)
    assert manifest.parity.status == "passed"
    assert "peft" in manifest.parity.checked
    project = artifact.parents[1]
    with loraexport_runtime.load_model(artifact) as session:
        session.load_adapter("again", project / "sql")
        for name in ("moved", "longer"):
            with pytest.raises(AdapterWeightsError, match=DIFFERENT):
                session.load_adapter("other", project / name)
    base = {"kind": "transformers", "path": str(project / "bert"), "task": "feature-extraction"}
    adapters = [{"name": "other", "path": str(project / "longer")}]
    spec = Project(tmp_path).spec(base=base, adapters=adapters)
    expected = r"of \[61, 32\], and this base's is \[60, 32\]: it was resized before the training"
    with pytest.raises(AdapterWeightsError, match=expected):
        make_plan(read_spec(spec), tmp_path)


def test_of_a_decoder(home: Home, tmp_path: Path) -> None:
    """PEFT saves the output layer too; the embedding may be called as in the bare model."""
    project = shutil.copytree(home.project(write_family, "Llama"), tmp_path / "project")
    tensors = load_file(project / "base/model.safetensors")
    modules = {"model.embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
    copies = {name: tensors[f"{module}.weight"] for name, module in modules.items()}
    plain = shutil.copytree(project / "first", tmp_path / "plain")

    def load(change: Change) -> None:
        shutil.rmtree(project / "first")
        shutil.copytree(plain, project / "first")
        add(project / "first", copies, change)
        plan: Any = make_plan(read_spec(project / "spec.yaml"), project)
        load_adapters(plan, *load_decoder_base(plan))

    load(np.copy)
    with pytest.raises(AdapterWeightsError, match=DIFFERENT):
        load(moved)
    with pytest.raises(
        AdapterWeightsError, match=r"of \[321, 64\], and this base's is \[320, 64\]"
    ):
        load(longer)


def test_of_a_graph(tmp_path: Path) -> None:
    """By the names that its exporter keeps: the table of words, and the output layer's product."""
    generator = np.random.default_rng(0)
    words, q, head = (
        generator.standard_normal(shape).astype(np.float32)
        for shape in ((20, 16), (16, 16), (16, 20))
    )
    weights = {"model.embed_tokens.weight": words, "model.q.weight": q, "lm_head.weight": head}
    nodes = [
        helper.make_node("Gather", ["model.embed_tokens.weight", "input_ids"], ["x"], "lookup"),
        helper.make_node("MatMul", ["x", "model.q.weight"], ["y"], "q"),
        helper.make_node("MatMul", ["y", "lm_head.weight"], ["z"], "head"),
    ]
    taken = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "n"])
    given = helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", "n", 20])
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "hand", [taken], [given], tensors)
    (tmp_path / "graph").mkdir()
    opsets = [helper.make_opsetid("", 21)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(made, tmp_path / "graph/model.onnx")
    (tmp_path / "graph/config.json").write_text(json.dumps({"model_type": "llama"}))
    spec = Project(tmp_path).spec(
        base={"kind": "onnx", "path": "graph"}, adapters=[{"name": "sql", "path": "sql"}]
    )

    def load(module: str, copies: dict[str, np.ndarray], change: Change = np.copy) -> None:
        write_adapter(tmp_path / "sql", {module: (16, 16)})
        add(tmp_path / "sql", copies, change)
        plan: Any = make_plan(read_spec(spec), tmp_path)
        load_adapters(plan, load_graph_base(plan, plan.kind))

    load("model.q", {"model.embed_tokens": words, "lm_head": np.ascontiguousarray(head.T)})
    load("q", {"embed_tokens": words})
    for copies in ({"embed_tokens": words}, {"lm_head": np.ascontiguousarray(head.T)}):
        for change in (moved, longer):
            with pytest.raises(AdapterWeightsError, match=DIFFERENT):
                load("q", copies, change)


def test_of_single_layers(tmp_path: Path) -> None:
    """They hold no embedding but those that are layers: nothing vouches for a copy."""
    spec = write_small(tmp_path)
    add(tmp_path / "sql", {"words": load_file(tmp_path / "base/model.safetensors")["words.weight"]})
    plan: Any = make_plan(read_spec(spec), tmp_path)
    expected = r"words\.weight', and of this base no weight of that name is known.*layers=False"
    with pytest.raises(AdapterWeightsError, match=expected):
        load_adapters(plan, load_layers_base(plan))
