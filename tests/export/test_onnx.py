"""The exported graphs: which operators they are, and what they must not hold."""

import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from support.adapters import write_adapter
from support.builds import Project
from support.models import write_base
from torch.onnx._internal.exporter._registration import ONNXRegistry

from loraexport.bases.adapters import load_adapters
from loraexport.bases.layers import LayerModules, build_modules, load_layers_base
from loraexport.errors import ExportError
from loraexport.export import onnx as onnx_export
from loraexport.export.onnx import export_onnx
from loraexport.export.torchscript import export_torchscript
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec

SEGMENT_OPERATORS = Counter(
    Shape=2, Squeeze=1, Slice=2, Add=1, Expand=2, ScatterElements=1, CumSum=1, Gather=1, Reshape=2
)
"""Slot of each token from the segments, and the number of tokens."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graphs")
    write_base(path / "base")
    sites = {"blocks.0.q": (32, 32), "blocks.0.v": (32, 16), "words": (40, 32)}
    write_adapter(path / "sql", sites, seed=1, embeddings=("words",))
    write_adapter(
        path / "chat",
        {"blocks.0.q": (32, 32), "words": (40, 32)},
        seed=2,
        rank=8,
        embeddings=("words",),
    )
    return path


def build(folder: Path, strategy: str, dtype: str = "float32") -> tuple[LayerModules, LayerModules]:
    """A fused linear layer and an embedding."""
    qkv = {
        "name": "qkv",
        "type": "linear",
        "slices": [{"name": part, "site": f"blocks.0.{part}"} for part in ("q", "k", "v")],
    }
    words = {"name": "words", "type": "embedding", "site": "words"}
    spec = Project(folder).spec(
        base={"kind": "layers", "path": "base", "layers": [qkv, words]},
        export={"strategy": strategy, "dtype": dtype},
    )
    plan = make_plan(read_spec(spec), folder)
    base = load_layers_base(plan)
    linear, embedding = build_modules(plan, base, load_adapters(plan, base))
    return linear, embedding


@pytest.fixture(scope="module")
def graphs(folder: Path) -> dict[tuple[str, str], onnx.ModelProto]:
    """Every strategy's graph of a linear layer and an embedding."""
    made = {}
    for strategy in ("segmented", "masked", "augmented", "chunked"):
        for one in build(folder, strategy):
            if one.layer.strategy != strategy:
                continue
            path = folder / f"{strategy}-{one.layer.name}.onnx"
            export_onnx(one, "float32", path)
            made[strategy, one.layer.kind] = onnx.load(path)
    return made


def operators(graph: onnx.ModelProto, prefix: str = "") -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node if node.name.startswith(prefix))


def inputs_of(graph: onnx.ModelProto, name: str) -> list[str]:
    return next(list(node.input) for node in graph.graph.node if node.name == name)


def test_masked_is_three_products_and_a_select(
    graphs: dict[tuple[str, str], onnx.ModelProto],
) -> None:
    graph = graphs["masked", "linear"]
    own = Counter(Unsqueeze=1, Equal=1, Where=1)
    assert operators(graph) == SEGMENT_OPERATORS + own + Counter(Gemm=3)
    assert inputs_of(graph, "qkv/base/gemm") == ["x", "qkv.base.weight", "qkv.base.bias"]
    assert inputs_of(graph, "qkv/lora/shrink/gemm") == ["x", "qkv.lora_A"]
    assert inputs_of(graph, "qkv/lora/select/where")[:2] == [
        "qkv/lora/own/equal",
        "qkv/lora/shrink/gemm",
    ]
    assert inputs_of(graph, "qkv/lora/expand/gemm") == [
        "qkv/lora/select/where",
        "qkv.lora_B",
        "qkv/base/gemm",  # the fused form: the base output is the C of expand
    ]


def test_augmented_is_two_products(graphs: dict[tuple[str, str], onnx.ModelProto]) -> None:
    graph = graphs["augmented", "linear"]
    found = operators(graph)
    assert (found["Gemm"], found["MatMul"], found["Where"]) == (1, 1, 1)
    assert inputs_of(graph, "qkv/lora/base_expand/matmul") == [
        "qkv/lora/base_expand/concat",
        "qkv.weight_lora_B",
    ]
    kept = {tensor.name for tensor in graph.graph.initializer}
    assert not {"qkv.base.weight", "qkv.base.bias"} & kept


def test_chunked_is_batched_products(graphs: dict[tuple[str, str], onnx.ModelProto]) -> None:
    graph = graphs["chunked", "linear"]
    found = operators(graph)
    assert (found["Gemm"], found["MatMul"]) == (1, 2)
    assert operators(graph, "qkv/lora/shrink")["MatMul"] == 1
    assert operators(graph, "qkv/lora/expand")["MatMul"] == 1
    assert not {"If", "Loop", "Scan", "NonZero"} & set(found)


def test_segmented_is_a_gemm_pair_per_slot(
    graphs: dict[tuple[str, str], onnx.ModelProto],
) -> None:
    graph = graphs["segmented", "linear"]
    found = operators(graph)
    assert (found["Gemm"], found["NonZero"], found["Concat"]) == (1 + 2 * 2, 3, 2)
    assert "ScatterND" not in found  # 1.9 ms each on an H200
    for suffix in ("", "_2"):
        assert len(inputs_of(graph, f"qkv/lora/expand/gemm{suffix}")) == 3


@pytest.mark.parametrize("strategy", ["segmented", "masked", "chunked"])
def test_embedding_shrinks_by_a_gather(
    strategy: str, graphs: dict[tuple[str, str], onnx.ModelProto]
) -> None:
    graph = graphs[strategy, "embedding"]
    gathers = [node for node in graph.graph.node if "words.lora_A" in node.input]
    assert [node.op_type for node in gathers] == ["Gather"]
    assert operators(graph)["Gemm"] == {"segmented": 2, "masked": 1, "chunked": 0}[strategy]


def test_contract_of_every_graph(graphs: dict[tuple[str, str], onnx.ModelProto]) -> None:
    for (strategy, kind), graph in graphs.items():
        onnx.checker.check_model(graph, full_check=True)
        layer, x = ("qkv", "x") if kind == "linear" else ("words", "ids")
        b = f"{layer}.weight_lora_B" if strategy == "augmented" else f"{layer}.lora_B"
        stacks = [f"{layer}.lora_A", b]
        assert [one.name for one in graph.graph.input] == [x, "seg_indptr", "seg_slots", *stacks]
        assert [one.name for one in graph.graph.output] == ["y"]
        assert set(stacks) <= {tensor.name for tensor in graph.graph.initializer}
        assert {one.domain for one in graph.opset_import} <= {"", "com.microsoft"}
        assert graph.opset_import[0].version == 23
        # Scaling lives in B: nothing of float type is ever multiplied elementwise.
        scaled = [node for node in graph.graph.node if node.op_type == "Mul"]
        assert all("layout" in node.name or "gather" in node.name for node in scaled)


def test_names_tell_layer_and_role(graphs: dict[tuple[str, str], onnx.ModelProto]) -> None:
    for (_, kind), graph in graphs.items():
        layer = "qkv" if kind == "linear" else "words"
        names = [node.name for node in graph.graph.node]
        assert len(set(names)) == len(names)
        assert all(name.startswith(f"{layer}/") for name in names)
        outputs = [value for node in graph.graph.node for value in node.output]
        assert all(value.startswith(f"{layer}/") or value == "y" for value in outputs)


def test_no_metadata_is_left(graphs: dict[tuple[str, str], onnx.ModelProto]) -> None:
    for graph in graphs.values():
        assert not graph.metadata_props
        assert not graph.doc_string
        assert not graph.graph.doc_string
        for node in graph.graph.node:
            assert not node.metadata_props
            assert not node.doc_string
        text = graph.SerializeToString()
        assert b".py" not in text
        assert b"site-packages" not in text


def test_masks_never_multiply(graphs: dict[tuple[str, str], onnx.ModelProto]) -> None:
    """Contract 3: inf * 0 is NaN, so what is not a token's own is selected away."""
    for graph in graphs.values():
        bools = {
            node.output[0]
            for node in graph.graph.node
            if node.op_type in ("Equal", "Greater", "Unsqueeze")
        }
        casts = [
            node for node in graph.graph.node if node.op_type == "Cast" and node.input[0] in bools
        ]
        assert casts == []


def test_external_data_beyond_the_limit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "EXTERNAL_DATA_FROM", 1000)
    linear, _ = build(folder, "masked")
    path = tmp_path / "layer.onnx"
    export_onnx(linear, "float32", path)
    assert (tmp_path / "layer.onnx.data").stat().st_size > 1000
    external = [
        tensor.name
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert {"qkv.base.weight", "qkv.lora_A", "qkv.lora_B"} <= set(external)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {
        "x": np.ones((3, 32), np.float32),
        "seg_indptr": np.array([0, 3]),
        "seg_slots": np.array([1]),
    }
    assert np.isfinite(session.run(None, feeds)[0]).all()


def test_torchscript_holds_the_loop_and_nothing_of_this_machine(
    folder: Path, tmp_path: Path
) -> None:
    linear, _ = build(folder, "masked", "float16")
    path = tmp_path / "layer.ts"
    export_torchscript(linear.layer, linear.segmented, "float16", path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        code = b"".join(archive.read(name) for name in names if name.endswith(".py"))
        everything = b"".join(archive.read(name) for name in names)
    assert not [name for name in names if "traced_inputs" in name or "debug_pkl" in name]
    assert re.search(rb"for \w+ in range\(torch\.len\(slots\)\)", code)
    assert code.count(b"torch.addmm(") == 1  # shrink, into the buffer
    assert code.count(b"torch.addmm_(") == 1  # expand, in place
    assert b"beta=0." in code
    assert b"out=h" in code
    for mark in (b"site-packages", str(folder).encode(), b"/loraexport/"):
        assert mark not in everything


def test_a_module_that_does_not_export_is_an_export_error(folder: Path, tmp_path: Path) -> None:
    linear, _ = build(folder, "masked")
    linear.stacked.lora.shrink.forward = lambda x, a: torch.special.bessel_j0(x @ a.t())
    with pytest.raises(ExportError, match=r"layer 'qkv': torch.onnx.export failed"):
        export_onnx(linear, "float32", tmp_path / "layer.onnx")
    assert not (tmp_path / "layer.onnx").exists()


def test_torch_makes_its_table_of_functions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And has its own way of making it back."""
    made = []

    def count(registry: type[ONNXRegistry], opset_version: int) -> ONNXRegistry:
        made.append(opset_version)
        return make.__get__(None, registry)(opset_version=opset_version)

    make, counted = vars(ONNXRegistry)["from_torchlib"], classmethod(count)
    monkeypatch.setattr(ONNXRegistry, "from_torchlib", counted)
    monkeypatch.setattr(onnx_export, "_TABLES", {})
    for width in (2, 3):
        onnx_export.export_program("x", torch.nn.Linear(width, 2), (torch.ones(1, width),), ({},))
    assert made == [onnx_export.OPSET]
    assert vars(ONNXRegistry)["from_torchlib"] is counted
