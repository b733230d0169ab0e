"""Sites as calls of functions: plain onnxruntime computes what it did, bit for bit."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from support.adapters import write_adapter
from support.builds import Project, write_model_project, write_tenants
from support.optimized import open_optimized

from loraexport.bases.adapters import load_adapters
from loraexport.bases.layers import build_modules, load_layers_base
from loraexport.bases.model import load_model_base
from loraexport.errors import ExportError, SpecError
from loraexport.export.functions import function
from loraexport.export.onnx import export_model_onnx, export_onnx
from loraexport.export.outline import outline, with_functions
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.manifest import FUNCTION_DOMAIN, Function, Layer, Stack

SLOTS = 2
Export = Callable[[Path, int | None], dict[str, Function]]


def layer_export(folder: Path, strategy: str, name: str) -> tuple[Layer, Export]:
    plan = make_plan(read_spec(write_tenants(folder, export={"strategy": strategy})), folder)
    base = load_layers_base(plan)
    modules = build_modules(plan, base, load_adapters(plan, base))
    (one,) = [module for module in modules if module.layer.name == name]
    return one.layer, lambda path, slots: export_onnx(one, "float32", path, slots)


def drawn(session: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """Every input, and every stack anew."""
    random = np.random.default_rng(seed)
    fixed = {
        "ids": random.integers(0, 40, 9),
        "seg_indptr": np.array([0, 4, 4, 7, 9]),
        "seg_slots": np.array([1, 2, 0, 2]),
        "adapter_ids": np.array([2, 0, 1]),
        "input_ids": random.integers(1, 59, (3, 5)),
        "attention_mask": np.ones((3, 5), np.int64),
        "token_type_ids": np.zeros((3, 5), np.int64),
    }
    feeds = {entry.name: fixed[entry.name] for entry in session.get_inputs() if entry.name != "x"}
    for entry in session.get_inputs():
        if entry.name == "x":
            feeds["x"] = random.standard_normal((9, entry.shape[1])).astype(np.float32)
    for entry in session.get_overridable_initializers():
        feeds[entry.name] = random.standard_normal(entry.shape).astype(np.float32) * 0.3
    return feeds


def same(
    export: Export, folder: Path, found: dict[str, str]
) -> tuple[onnx.ModelProto, Counter[str], Counter[str]]:
    """The graph with functions, held to the one without; operators that it lacks, and has more."""
    plain, called = folder / "plain.onnx", folder / "called.onnx"
    assert export(plain, None) == {}
    assert export(called, SLOTS) == found
    proto = onnx.load(called)
    onnx.checker.check_model(proto, full_check=True)
    (before, operators), (after, kept) = map(open_optimized, (plain, called))
    stacks = [entry.name for entry in before.get_overridable_initializers()]
    ranks = [f"{name}.rank" for name in found]
    known = [entry.name for entry in after.get_overridable_initializers()]
    assert Counter(known) == Counter([*stacks, *ranks])
    feeds = drawn(before)
    for given in (feeds, {name: value for name, value in feeds.items() if name not in stacks}):
        for one, other in zip(before.run(None, given), after.run(None, given), strict=True):
            assert one.tobytes() == other.tobytes()
    fed, own = after.run(None, feeds)[0], after.run(None, given)[0]
    assert fed.tobytes() != own.tobytes(), "stacks that are fed take effect"
    return proto, operators - kept, kept - operators


def calls(proto: onnx.ModelProto) -> list[tuple[str, str]]:
    return [
        (node.op_type, node.overload) for node in proto.graph.node if node.domain == FUNCTION_DOMAIN
    ]


@pytest.mark.parametrize("name", ["qkv", "up"])
def test_a_masked_layer(tmp_path: Path, name: str) -> None:
    layer, export = layer_export(tmp_path, "masked", name)
    proto, lacks, more = same(export, tmp_path, {name: "LoraAdd"})
    assert calls(proto) == [("Route", ""), ("LoraAdd", "")]
    assert not lacks
    assert not more
    (site,) = [node for node in proto.graph.node if node.op_type == "LoraAdd"]
    given = {attribute.name: attribute.i for attribute in site.attribute}
    assert given == {"num_slots": SLOTS, "rows_per_slot": layer.stacks[0].rows_per_slot}
    assert site.name == f"{name}/lora/expand/loraadd"


def test_an_augmented_layer(tmp_path: Path) -> None:
    _, export = layer_export(tmp_path, "augmented", "up")
    proto, lacks, more = same(export, tmp_path, {"up": "LoraLinear"})
    assert calls(proto) == [("Route", ""), ("LoraLinear", "")]
    assert not lacks
    assert not more


def test_an_augmented_layer_with_a_bias(tmp_path: Path) -> None:
    """The rows of the rest take their shape from the mask."""
    _, export = layer_export(tmp_path, "augmented", "qkv")
    proto, lacks, more = same(export, tmp_path, {"qkv": "LoraLinear"})
    assert calls(proto) == [("Route", ""), ("LoraLinear", "bias")]
    assert (lacks, more) == (Counter(Concat=1), Counter(Shape=1))
    (site,) = [node for node in proto.graph.node if node.op_type == "LoraLinear"]
    assert {one.name: one.i for one in site.attribute}["bias_rows"] == 8


@pytest.mark.parametrize("strategy", [pytest.param("masked", marks=pytest.mark.slow), "augmented"])
def test_a_whole_model(tmp_path: Path, strategy: str) -> None:
    export = {"strategy": strategy, "formats": ["onnx"], "tune": {"tokens": 2**16}}
    spec = write_model_project(tmp_path, slots=SLOTS, sites="all-linear", export=export)
    plan = make_plan(read_spec(spec), tmp_path)
    _, modules = load_model_base(plan)
    names: dict[str, str] = {}
    for planned in plan.layers:
        if planned.layer.name == "pooler.dense":
            continue  # what it gives is no output of this task, so nothing computes it
        count = sum(stack.role == "lora_B" for stack in planned.layer.stacks)
        linear = "LoraLinear" if count == 1 else f"LoraLinear{count}"
        names[planned.layer.name] = "LoraAdd" if strategy == "masked" else linear
    proto, lacks, more = same(
        lambda path, slots: export_model_onnx(modules, "model", path, slots), tmp_path, names
    )
    assert [name for name, _ in calls(proto)].count("Route") == 1
    if strategy == "masked":
        assert not lacks
        assert not more
    else:  # as a layer's
        assert "LoraLinear3" in names.values()
        assert (lacks, more) == (Counter(Concat=1, Reshape=1, Mul=1), Counter(Shape=1))
    fused = {"SkipLayerNormalization", "BiasGelu"}
    _, operators = open_optimized(tmp_path / "called.onnx")
    assert fused <= set(operators)


def test_sites_with_parameters_of_each_slot(tmp_path: Path) -> None:
    """DoRA's scales and biases: the base of a LoraAdd is what stock operators make of them."""
    spec = write_model_project(tmp_path, slots=SLOTS, features=["dora", "bias"])
    plan = make_plan(read_spec(spec), tmp_path)
    _, modules = load_model_base(plan)
    names = {planned.layer.name: "LoraAdd" for planned in plan.layers}
    roles = {stack.role for planned in plan.layers for stack in planned.layer.stacks}
    assert {"output_scale", "bias"} <= roles
    _, lacks, more = same(
        lambda path, slots: export_model_onnx(modules, "model", path, slots), tmp_path, names
    )
    assert not lacks
    assert not more


def test_layers_without_a_function_keep_their_operators(tmp_path: Path) -> None:
    layer, export = layer_export(tmp_path, "masked", "words")
    _, lacks, more = same(export, tmp_path, {})
    assert not lacks
    assert not more
    with pytest.raises(
        ExportError, match=r"no site could be a call of a function \(they are embedding by masked\)"
    ):
        with_functions([layer], {}, SLOTS)


def test_what_is_said_of_the_layers(tmp_path: Path) -> None:
    words, _ = layer_export(tmp_path, "masked", "words")
    write_adapter(tmp_path / "sql", {"blocks.0.up": (32, 48)})
    layers, said = with_functions([words], {"words": "LoraAdd"}, SLOTS)
    assert [layer.function for layer in layers] == ["LoraAdd"]
    assert layers[0].stacks == (*words.stacks, Stack("words.rank", "rank", (SLOTS, 1), 1, 0, 0))
    assert said == "1 of 1 layers call functions that kernels may take"


SHARED = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[n, 4] x, int64[n] ids, float[2, 4] A1, float[2, 4] B1, float[2, 4] A2, float[2, 4] B2)
    => (float[n, 4] z)
    <int64[1] one = {1}, int64[1, 2] owners = {1, 2}, float zero = {0}> {
    slots1 = Unsqueeze(ids, one)
    own1 = Equal(slots1, owners)
    h1 = Gemm<transB = 1>(x, A1)
    own_h1 = Where(own1, h1, zero)
    y = Gemm(own_h1, B1, x)
    slots2 = Unsqueeze(ids, one)
    own2 = Equal(slots2, owners)
    h2 = Gemm<transB = 1>(y, A2)
    own_h2 = Where(own2, h2, zero)
    z = Gemm(own_h2, B2, y)
}
"""


def test_equal_slots_are_routed_once_ahead_of_all(tmp_path: Path) -> None:
    """Though the last of the sites is the first of the layers."""
    layer, _ = layer_export(tmp_path, "masked", "up")
    layers = [
        replace(
            layer,
            name=number,
            stacks=(
                Stack(f"A{number}", "lora_A", (2, 4), 1, 0, 0),
                Stack(f"B{number}", "lora_B", (2, 4), 1, 0, 0),
            ),
        )
        for number in "21"
    ]
    model = ir.from_proto(onnx.parser.parse_model(SHARED))
    initial = {"A1": np.eye(2, 4), "A2": np.eye(1, 8).reshape(2, 4)}
    assert outline(model, layers, SLOTS, initial) == {"1": "LoraAdd", "2": "LoraAdd"}
    ranks = {value.name: value.const_value for value in model.graph.inputs if value.const_value}
    assert {name: value.numpy().tolist() for name, value in ranks.items()} == {
        "1.rank": [[1], [1]],
        "2.rank": [[1], [0]],
    }
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert calls(proto) == [("Route", ""), ("LoraAdd", ""), ("LoraAdd", "")]
    assert len(proto.graph.node) == 3
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {name: random.standard_normal((2, 4)) for name in ("A1", "B1", "A2")}
    feeds |= {"B2": random.standard_normal((2, 4)), "x": random.standard_normal((3, 4))}
    feeds = {name: value.astype(np.float32) for name, value in feeds.items()}
    feeds["ids"] = np.array([2, 0, 1])
    ys = []
    for one in (onnx.parser.parse_model(SHARED), proto):
        onnx.save(one, tmp_path / "shared.onnx")
        ys.append(open_optimized(tmp_path / "shared.onnx")[0].run(None, feeds)[0].tobytes())
    assert ys[0] == ys[1]


def test_a_graph_of_an_old_opset() -> None:
    with pytest.raises(ExportError, match="the graph is of opset 17, and functions take 18"):
        function("Route", "", 17)


def test_a_strategy_of_another_form_is_left_alone(tmp_path: Path) -> None:
    """Also where a layer's words say that it is masked."""
    layer, _ = layer_export(tmp_path, "masked", "up")
    _, export = layer_export(tmp_path / "other", "chunked", "up")
    export(tmp_path / "chunked.onnx", None)
    model = ir.load(tmp_path / "chunked.onnx")
    before = len(list(model.graph))
    assert outline(model, [layer], SLOTS, {}) == {}
    assert len(list(model.graph)) == before
    assert FUNCTION_DOMAIN not in model.opset_imports


@pytest.mark.parametrize(
    ("export", "problem"),
    [
        ({"strategy": "chunked"}, "kernels beside strategy 'chunked'"),
        ({"strategy": "segmented"}, "kernels beside strategy 'segmented'"),
        ({"formats": ["torchscript"]}, "kernels beside formats without onnx"),
        ({"blend": True}, "kernels beside blend"),
    ],
)
def test_settings_that_exclude_each_other(
    project: Project, export: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SpecError, match=problem):
        read_spec(project.spec(export=export | {"kernels": True}))
