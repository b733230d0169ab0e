"""onnxruntime's fused operators in exported models: where they are, and where they must not be."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.builds import write_model_project, write_vit_project

from loraexport.bases.model import load_model_base
from loraexport.export.fuse import fuse
from loraexport.export.onnx import export_model_onnx
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec

HEADS, SIZE, WIDTH = 2, 4, 8


def export(spec: Path) -> dict[str, list[ir.Node]]:
    """The nodes of a project's graph by operator."""
    _, modules = load_model_base(make_plan(read_spec(spec), spec.parent))
    path = spec.with_name("model.onnx")
    export_model_onnx(modules, "model", path)
    found: dict[str, list[ir.Node]] = {}
    for node in ir.load(path).graph:
        found.setdefault(node.op_type, []).append(node)
    return found


def test_a_bert_has_one_addend_for_all_layers(tmp_path: Path) -> None:
    nodes = export(write_model_project(tmp_path))
    assert "Attention" not in nodes
    assert "Gelu" not in nodes
    assert len(nodes["BiasGelu"]) == len(nodes["MultiHeadAttention"]) == 2
    assert len({node.inputs[5] for node in nodes["MultiHeadAttention"]}) == 1
    biases = [str(node.inputs[1].name) for node in nodes["BiasGelu"] if node.inputs[1]]
    assert all(name.endswith("intermediate.dense.bias") for name in biases), biases
    assert "Transpose" not in nodes
    assert all("attention/self" in str(node.name) for node in nodes["MultiHeadAttention"])


@pytest.mark.parametrize("strategy", [pytest.param("augmented", marks=pytest.mark.slow), "masked"])
def test_the_operators_behind_a_site_take_its_bias_along(tmp_path: Path, strategy: str) -> None:
    """So does onnxruntime's layer norm, and an augmented stack those of q, k and v."""
    changes = {"sites": "all-linear", "export": {"formats": ["onnx"], "strategy": strategy}}
    export(write_model_project(tmp_path, **changes))
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.InferenceSession(tmp_path / "model.onnx", options, ["CPUExecutionProvider"])
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    found: dict[str, list[str]] = {}
    for node in graph.node:
        for name in node.input:
            if name.endswith("bias") and "LayerNorm" not in name:
                found.setdefault(node.op_type, []).append(".".join(name.split(".")[5:]))
    places = ["attention.output.dense.bias", "output.dense.bias"] * 2
    assert sorted(found.pop("SkipLayerNormalization")) == sorted(places)
    assert found.pop("BiasGelu") == ["intermediate.dense.bias"] * 2
    if strategy == "masked":  # q, k and v are one product
        assert all(name.startswith("attention.self.") for name in found.pop("Add"))
    assert not found


def test_a_vit_whose_first_layer_has_a_site_at_q_alone(tmp_path: Path) -> None:
    """Its q comes out of the site as [rows, out], k and v as [batch, n, out]."""
    nodes = export(write_vit_project(tmp_path))
    assert "Attention" not in nodes
    assert len(nodes["MultiHeadAttention"]) == 2


def test_bfloat16_keeps_the_standard_operators(tmp_path: Path) -> None:
    spec = write_model_project(tmp_path, export={"dtype": "bfloat16"}, parity={"onnx": "deferred"})
    nodes = export(spec)
    assert len(nodes["Attention"]) == len(nodes["Gelu"]) == 2
    assert "MultiHeadAttention" not in nodes


def attention(biased: str = "", **attributes: Any) -> ir.Model:
    """x -> heads -> Attention with a mask -> y, as torch.onnx.export writes it.

    Args:
        biased: of q, k and v those to which a bias is added first.
    """
    nodes = []
    for name in "qkv":
        if name in biased:
            nodes.append(helper.make_node("Add", [name, f"{name}_bias"], [f"{name}3"]))
        x = f"{name}3" if name in biased else name
        nodes.append(helper.make_node("Reshape", [x, "apart"], [f"{name}4"]))
        nodes.append(helper.make_node("Transpose", [f"{name}4"], [f"{name}h"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Attention", ["qh", "kh", "vh", "mask"], ["h"], **attributes))
    nodes.append(helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["t", "joined"], ["y"]))
    x = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", "n", WIDTH]) for name in "qkv"
    ]
    mask = helper.make_tensor_value_info("mask", TensorProto.BOOL, ["b", 1, "n", "n"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "n", WIDTH])
    values = {"apart": np.array([0, 0, HEADS, SIZE]), "joined": np.array([0, 0, WIDTH])}
    random = np.random.default_rng(1)
    values |= {f"{name}_bias": random.standard_normal(WIDTH).astype(np.float32) for name in biased}
    constants = [numpy_helper.from_array(one, name) for name, one in values.items()]
    graph = helper.make_graph(nodes, "g", [*x, mask], [y], constants)
    opsets = [helper.make_opsetid("", 23)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model) -> np.ndarray:
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {
        name: random.standard_normal((3, 5, WIDTH)).astype(np.float32) for name in "qkv"
    }
    mask = np.arange(5) < np.array([5, 3, 1])[:, None]
    (shape,) = [value.shape for value in model.graph.inputs if value.name == "mask"]
    assert shape is not None
    queries = 1 if shape[2] == 1 else 5
    feeds["mask"] = np.broadcast_to(mask[:, None, None], (3, 1, queries, 5)).copy()
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    y: np.ndarray = session.run(None, feeds)[0]
    return y


@pytest.mark.parametrize("scale", [0.5, 0.1])
def test_it_computes_the_same(scale: float) -> None:
    expected = run(attention(scale=scale))
    model = attention(scale=scale)
    fuse(model)
    assert [node.op_type for node in model.graph].count("MultiHeadAttention") == 1
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [0.0, 30.0], ids=["fused", "as-it-is"])
def test_a_mask_of_all_queries_is_repeated_for_each(softcap: float) -> None:
    """LayoutLM's: onnxruntime's Attention takes none with one row for all."""
    expected = run(attention(scale=0.5, softcap=softcap))
    model = attention(scale=0.5, softcap=softcap)
    (mask,) = [value for value in model.graph.inputs if value.name == "mask"]
    mask.shape = ir.Shape(["b", 1, 1, "n"])
    fuse(model)
    kind = "Attention" if softcap else "MultiHeadAttention"
    assert kind in [node.op_type for node in model.graph]
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("biased", ["q", "qk", "qkv"])
def test_attention_takes_the_biases_of_all_three_or_of_none(biased: str) -> None:
    expected = run(attention(biased))
    model = attention(biased)
    fuse(model)
    assert ("Add" in [node.op_type for node in model.graph]) == (biased != "qkv")
    np.testing.assert_allclose(run(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("used_twice", "left", "width"),
    [
        (False, False, WIDTH),
        (True, False, WIDTH),
        (False, True, WIDTH),
        (False, False, 1),  # the Add makes it wider
    ],
)
def test_a_gelu_takes_the_bias_that_was_added_before_it(
    used_twice: bool, left: bool, width: int
) -> None:
    random = np.random.default_rng(1)
    bias = numpy_helper.from_array(random.standard_normal(WIDTH).astype(np.float32), "bias")
    inputs = ["bias", "x"] if left else ["x", "bias"]
    nodes = [helper.make_node("Add", inputs, ["s"]), helper.make_node("Gelu", ["s"], ["g"])]
    nodes.append(helper.make_node("Neg", ["g"], ["y"]))
    names = {"x": width, "y": WIDTH} | ({"s": WIDTH} if used_twice else {})
    x, *outputs = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", size])
        for name, size in names.items()
    )
    graph = helper.make_graph(nodes, "g", [x], outputs, [bias])
    opsets = [helper.make_opsetid("", 23)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto)
    feeds = {"x": random.standard_normal((3, width)).astype(np.float32)}
    expected = ort.InferenceSession(proto.SerializeToString()).run(["y"], feeds)[0]
    model = ir.from_proto(proto)
    fuse(model)
    kinds = [node.op_type for node in model.graph]
    assert kinds == ["Add"] * (used_twice or width == 1) + ["BiasGelu", "Neg"]
    found = ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(["y"], feeds)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("more", [{"is_causal": 1}, {"softcap": 2.0}])
def test_what_the_fused_one_cannot_do_stays(more: dict[str, Any]) -> None:
    model = attention(**more)
    fuse(model)
    assert "Attention" in {node.op_type for node in model.graph}
    assert "com.microsoft" not in model.opset_imports
