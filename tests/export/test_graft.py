"""Multi-LoRA grafted into hand-made ONNX graphs: every kind of product, held to float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.optimized import open_optimized

from loraexport.bases.decoder import fit_stacks
from loraexport.errors import BaseModelError, ExportError
from loraexport.export.graft import graft
from loraexport.graphs.products import find_grafts
from loraexport_runtime.contract.manifest import Layer, Slice, Stack, Strategy

SIZE, VOCABULARY, SLOTS, RANK, BLOCK = 32, 20, 2, 4, 16
SCALINGS = {1: 0.5, 2: 2.0}
QKV = {"q_proj": 24, "k_proj": 8, "v_proj": 8}


def _site(block: int, *names: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{block}.{name}" for name in names)


@dataclass(frozen=True)
class Case:
    """A layer, and the graph's outputs that are its own, side by side."""

    sites: dict[str, int]
    """site -> out features"""
    outputs: tuple[str, ...]


CASES = {
    "matmul": Case(dict.fromkeys(_site(0, "mlp.down_proj"), 12), ("matmul",)),
    "matmul-add": Case(dict.fromkeys(_site(0, "self_attn.o_proj"), 12), ("added",)),
    "packed": Case(
        {f"model.layers.1.self_attn.{name}": width for name, width in QKV.items()},
        ("packed_q", "packed_k", "packed_v"),
    ),
    "split": Case(
        {"model.layers.2.self_attn.qkv_proj": sum(QKV.values())}, ("split_q", "split_k", "split_v")
    ),
    "slices": Case(dict.fromkeys(_site(3, "mlp.gate_proj", "mlp.up_proj"), 12), ("gate", "up")),
    "gemm": Case({"model.layers.4.fc": 10}, ("gemm",)),
    "gemm-plain": Case({"model.layers.5.fc": 10}, ("gemm_plain",)),
    "nbits": Case({"lm_head": 12}, ("logits",)),
}


def _random(seed: int, *shape: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.3).astype(np.float32)


class Hand:
    """A graph from input_ids [batch, tokens], and what each case's base gives in float64."""

    def __init__(self) -> None:
        self.weights: dict[str, np.ndarray] = {"embed": _random(0, VOCABULARY, SIZE)}
        self.nodes = [helper.make_node("Gather", ["embed", "input_ids"], ["x"], "/embed/Gather")]
        self.base: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """output -> W [in, out], bias [out]"""

    def matmul(self, node: str, output: str, width: int, x: str = "x") -> None:
        weight = _random(len(self.nodes), SIZE, width)
        name = node.strip("/").replace("/", ".") + ".weight"
        self.weights[name] = weight
        self.nodes.append(helper.make_node("MatMul", [x, name], [output], node))
        self.base[output] = (weight.astype(np.float64), np.zeros(width))

    def add(self, x: str, output: str) -> None:
        weight, _ = self.base.pop(x)
        bias = _random(len(self.nodes), weight.shape[1])
        self.weights[f"{output}.bias"] = bias
        self.nodes.append(helper.make_node("Add", [x, f"{output}.bias"], [output], f"/{output}"))
        self.base[output] = (weight, bias.astype(np.float64))

    def gemm(self, site: str, output: str, width: int, turned: bool) -> None:
        """Named by its weight only; Gemm takes matrices, so that a Reshape is at either side."""
        weight, bias = _random(len(self.nodes), SIZE, width), _random(99, width)
        self.weights[f"{site}.weight"] = weight.T.copy() if turned else weight
        self.weights[f"{output}.bias"] = bias
        self.weights.setdefault("rows", np.array([-1, SIZE]))
        shape = f"{output}.shape"
        self.weights[f"{output}.size"] = np.array([width])
        self.nodes += [
            helper.make_node("Reshape", ["x", "rows"], [f"{output}.x"], f"/{output}/in"),
            helper.make_node(
                "Gemm",
                [f"{output}.x", f"{site}.weight", f"{output}.bias"],
                [f"{output}.y"],
                f"node_{output}",
                transB=int(turned),
            ),
            helper.make_node("Shape", ["input_ids"], [f"{output}.ids"], f"/{output}/ids"),
            helper.make_node(
                "Concat", [f"{output}.ids", f"{output}.size"], [shape], f"/{output}/shape", axis=0
            ),
            helper.make_node("Reshape", [f"{output}.y", shape], [output], f"/{output}/out"),
        ]
        self.base[output] = (weight.astype(np.float64), bias.astype(np.float64))

    def nbits(self, node: str, output: str, width: int) -> None:
        generator = np.random.default_rng(7)
        blocks = SIZE // BLOCK
        digits = generator.integers(0, 16, (width, blocks, BLOCK), dtype=np.uint8)
        scales = generator.uniform(0.01, 0.1, (width, blocks)).astype(np.float32)
        self.weights["head.qweight"] = digits[..., ::2] | (digits[..., 1::2] << 4)
        self.weights["head.scales"] = scales
        self.nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", "head.qweight", "head.scales"],
                [output],
                node,
                domain="com.microsoft",
                K=SIZE,
                N=width,
                bits=4,
                block_size=BLOCK,
            )
        )
        real = (digits.astype(np.float64) - 8) * scales[..., None]
        self.base[output] = (real.reshape(width, SIZE).T, np.zeros(width))

    def model(self, outputs: Sequence[str]) -> ir.Model:
        graph = helper.make_graph(
            self.nodes,
            "hand",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "tokens", None])
                for name in outputs
            ],
            [numpy_helper.from_array(value, name) for name, value in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        return ir.from_proto(model)


def _whole() -> Hand:
    hand = Hand()
    hand.matmul("/model/layers.0/mlp/down_proj/MatMul", "matmul", 12)
    hand.matmul("/model/layers.0/attn/o_proj/MatMul", "sum", 12)
    hand.add("sum", "added")
    hand.matmul("/model/layers.1/attn/qkv_proj/MatMul", "qkv", sum(QKV.values()))
    hand.weights["qkv.widths"] = np.array(list(QKV.values()))
    parts = ["packed_q", "packed_k", "packed_v"]
    hand.nodes.append(
        helper.make_node("Split", ["qkv", "qkv.widths"], parts, "/model/layers.1/split", axis=-1)
    )
    packed, _ = hand.base.pop("qkv")
    columns = np.cumsum([0, *QKV.values()])
    for index, part in enumerate(parts):
        weight = packed[:, columns[index] : columns[index + 1]]
        hand.base[part] = (weight, np.zeros(weight.shape[1]))
    for name, width in QKV.items():
        hand.matmul(f"/model/layers.2/attn/{name}/MatMul", f"split_{name[0]}", width)
    for name in ("gate", "up"):
        hand.matmul(f"/model/layers.3/mlp/{name}_proj/MatMul", name, 12)
    hand.gemm("model.layers.4.fc", "gemm", 10, turned=True)
    hand.gemm("model.layers.5.fc", "gemm_plain", 10, turned=False)
    hand.nbits("/lm_head/MatMulNBits", "logits", 12)
    return hand


def _layer(
    name: str,
    sites: dict[str, int],
    size_in: int = SIZE,
    num_slots: int = SLOTS,
    strategy: Strategy = "masked",
) -> Layer:
    offsets = np.cumsum([0, *sites.values()]).tolist()
    rows, size_out = len(sites) * RANK, offsets[-1]
    return Layer(
        name=name,
        kind="linear",
        in_features=size_in,
        out_features=size_out,
        slices=tuple(
            Slice(site.rsplit(".", 1)[-1], site, offset, width)
            for (site, width), offset in zip(sites.items(), offsets, strict=False)
        ),
        max_rank=RANK,
        strategy=strategy,
        stacks=(
            Stack(f"{name}.lora_A", "lora_A", (num_slots * rows, size_in), rows, 0, 0),
            Stack(f"{name}.lora_B", "lora_B", (num_slots * rows, size_out), rows, 0, 0),
        ),
        base_rows=None,
        in_base=True,
        labels=False,
        onnx=None,
        torchscript=None,
    )


def _fill(layer: Layer, seed: int) -> tuple[dict[str, np.ndarray], dict[int, np.ndarray]]:
    """The slots' rows of a layer's stacks, and by slot the scaled B A [in, out] in float64."""
    first, *others = layer.stacks
    b_rows = np.zeros((SLOTS * first.rows_per_slot, layer.out_features), np.float32)
    stacks = {first.name: np.zeros(first.shape, np.float32)}
    deltas = {slot: np.zeros((layer.in_features, layer.out_features)) for slot in range(SLOTS + 1)}
    generator = np.random.default_rng([seed, 1])
    for slot, scaling in SCALINGS.items():
        for index, part in enumerate(layer.slices):
            a = generator.standard_normal((RANK, layer.in_features)).astype(np.float32) * 0.3
            b = generator.standard_normal((part.width, RANK)).astype(np.float32) * 0.3
            rows = slice(*(first.rows(slot).start + RANK * at for at in (index, index + 1)))
            columns = slice(part.offset, part.offset + part.width)
            stacks[first.name][rows] = a
            b_rows[rows, columns] = scaling * b.T  # powers of two: nothing is rounded
            delta = scaling * b.astype(np.float64) @ a.astype(np.float64)
            deltas[slot][:, columns] = delta.T
    return stacks | {one.name: b_rows[:, one.columns] for one in others}, deltas


@dataclass(frozen=True)
class Grafted:
    hand: Hand
    layers: dict[str, Layer]
    stacks: dict[str, np.ndarray]
    """As the graph has them, W among them where a layer is augmented."""
    deltas: dict[str, dict[int, np.ndarray]]
    plain: ort.InferenceSession
    session: ort.InferenceSession
    proto: onnx.ModelProto

    def run(self, ids: np.ndarray, adapter_ids: Sequence[int], **feeds: Any) -> dict[str, Any]:
        names = [one.name for one in self.session.get_outputs()]
        given = {"input_ids": ids, "adapter_ids": np.array(adapter_ids, np.int64), **feeds}
        return dict(zip(names, self.session.run(None, given), strict=True))


def _open(model: ir.Model) -> tuple[onnx.ModelProto, ort.InferenceSession]:
    proto = ir.to_proto(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    data = proto.SerializeToString()
    return proto, ort.InferenceSession(data, options, ["CPUExecutionProvider"])


OUTPUTS = tuple(name for case in CASES.values() for name in case.outputs)


@pytest.fixture(scope="module", params=["masked", "augmented"])
def grafted(request: pytest.FixtureRequest) -> Grafted:
    hand = _whole()
    model = hand.model(OUTPUTS)
    _, plain = _open(model)
    asked = [_layer(name, case.sites, strategy=request.param) for name, case in CASES.items()]
    grafts = [fit_stacks(one, SLOTS) for one in find_grafts(model.graph, asked)]
    layers = dict(zip(CASES, (one.layer for one in grafts), strict=True))
    stacks: dict[str, np.ndarray] = {}
    deltas = {}
    for seed, (name, layer) in enumerate(layers.items()):
        own, deltas[name] = _fill(layer, seed)
        stacks |= own
    graft(model, grafts, stacks, SLOTS, "float32")
    proto, session = _open(model)
    whole = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    for layer in layers.values():
        for stack in layer.stacks:
            assert whole[stack.name][stack.row_offset :].tobytes() == stacks[stack.name].tobytes()
    every = {stack: whole[stack] for stack in stacks}
    return Grafted(hand, layers, every, deltas, plain, session, proto)


IDS = np.random.default_rng(1).integers(0, VOCABULARY, (4, 5))


@pytest.mark.parametrize("name", CASES)
def test_the_sum_in_float64(grafted: Grafted, name: str) -> None:
    adapter_ids = (2, 0, 1, 2)
    found = grafted.run(IDS, adapter_ids)
    case = CASES[name]
    y = np.concatenate([found[output] for output in case.outputs], axis=-1)
    parts = [grafted.hand.base[output] for output in case.outputs]
    weight = np.concatenate([part for part, _ in parts], axis=1)
    bias = np.concatenate([part for _, part in parts])
    x = grafted.hand.weights["embed"].astype(np.float64)[IDS]
    for row, slot in enumerate(adapter_ids):
        delta = grafted.deltas[name][slot]
        assert (np.abs(delta).max() > 0.1) == (slot > 0)
        expected = x[row] @ weight + bias + x[row] @ delta
        np.testing.assert_allclose(y[row], expected, rtol=0, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_rows_of_slot_0_are_the_base_bit_for_bit(grafted: Grafted, name: str) -> None:
    plain = grafted.plain.run(CASES[name].outputs, {"input_ids": IDS})
    alone, mixed = grafted.run(IDS, (0, 0, 0, 0)), grafted.run(IDS, (1, 0, 2, 0))
    for output, base in zip(CASES[name].outputs, plain, strict=True):
        if grafted.layers[name].strategy == "masked":
            assert alone[output].tobytes() == base.tobytes()
        np.testing.assert_allclose(alone[output], base, rtol=0, atol=1e-6 * np.abs(base).max())
        assert mixed[output][[1, 3]].tobytes() == alone[output][[1, 3]].tobytes()


def test_a_row_does_not_see_the_others(grafted: Grafted) -> None:
    found = grafted.run(IDS, (1, 2, 0, 1))
    poisoned = {name: value.copy() for name, value in grafted.stacks.items()}
    for layer in grafted.layers.values():
        for stack in layer.stacks:
            poisoned[stack.name][stack.rows(2)] = 1e30  # finite, as what a load checks
    others = grafted.run(IDS, (1, 2, 0, 1), **poisoned)
    swapped = grafted.run(np.concatenate([IDS[:1], IDS[:1], IDS[2:]]), (1, 0, 0, 2))
    for name in OUTPUTS:
        for row in (0, 2, 3):
            assert others[name][row].tobytes() == found[name][row].tobytes()
        assert others[name][1].tobytes() != found[name][1].tobytes()
        for row in (0, 2):
            assert swapped[name][row].tobytes() == found[name][row].tobytes()


def test_batches_and_lengths_are_free(grafted: Grafted) -> None:
    for shape in ((1, 1), (1, 7), (6, 1)):
        ids = np.random.default_rng(2).integers(0, VOCABULARY, shape)
        slots = [row % (SLOTS + 1) for row in range(1, shape[0] + 1)]
        found = grafted.run(ids, slots)
        x = grafted.hand.weights["embed"].astype(np.float64)[ids]
        for row, slot in enumerate(slots):
            weight, _ = grafted.hand.base["matmul"]
            expected = x[row] @ (weight + grafted.deltas["matmul"][slot])
            np.testing.assert_allclose(found["matmul"][row], expected, rtol=0, atol=1e-5)


def test_the_graph_that_is_left(grafted: Grafted) -> None:
    proto = grafted.proto
    onnx.checker.check_model(proto, full_check=True)
    assert not proto.functions
    assert {entry.domain for entry in proto.opset_import} == {"", "com.microsoft"}
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx", "com.microsoft"}
    names = ["input_ids", "adapter_ids", *grafted.stacks]
    assert [one.name for one in proto.graph.input] == names
    assert [one.name for one in proto.graph.output] == list(OUTPUTS)
    for layer in grafted.layers.values():
        for one in layer.stacks:
            assert grafted.stacks[one.name].shape == one.shape
    # A weight is in the stack alone, or beside it.
    kept = {one.name for one in proto.graph.initializer}
    joined = {name for name, one in grafted.layers.items() if one.strategy == "augmented"}
    plain = {"matmul", "matmul-add", "packed", "split", "slices"}
    assert joined in (set(), plain)
    assert ("model.layers.0.mlp.down_proj.MatMul.weight" in kept) == (not joined)
    inputs = {one.name: one for one in grafted.session.get_inputs()}
    assert (inputs["adapter_ids"].type, inputs["adapter_ids"].shape) == ("tensor(int64)", ["batch"])
    found = [node.op_type for node in proto.graph.node]
    # One mask for all sites of one width, and one with flat rows for Gemm.
    widths = {len(layer.slices) for layer in grafted.layers.values()}
    assert found.count("Equal") == len(widths) + 1


def test_a_stack_that_is_fed_takes_the_place_of_the_graphs(grafted: Grafted) -> None:
    none = {name: value.copy() for name, value in grafted.stacks.items()}
    for layer in grafted.layers.values():
        for one in layer.stacks:
            none[one.name][one.row_offset :] = 0
    found, plain = grafted.run(IDS, (1, 2, 1, 2), **none), grafted.run(IDS, (0, 0, 0, 0))
    for name in OUTPUTS:
        np.testing.assert_array_equal(found[name], plain[name])


def test_sites_as_calls_of_functions(grafted: Grafted, tmp_path: Path) -> None:
    """The same bits by the same operators."""
    strategy = grafted.layers["matmul"].strategy
    model = _whole().model(OUTPUTS)
    asked = [_layer(name, case.sites, strategy=strategy) for name, case in CASES.items()]
    grafts = [fit_stacks(one, SLOTS) for one in find_grafts(model.graph, asked)]
    stacks = {}
    for seed, one in enumerate(grafts):
        stacks |= _fill(one.layer, seed)[0]
    found = graft(model, grafts, stacks, SLOTS, "float32", kernels=True)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    paths = [tmp_path / "plain.onnx", tmp_path / "called.onnx"]
    for one, path in zip((grafted.proto, proto), paths, strict=True):
        onnx.save(one, path)
    (plain, operators), (called, kept) = map(open_optimized, paths)
    assert kept == operators
    masked = dict.fromkeys(("gemm", "gemm-plain", "nbits"), "LoraAdd")
    of_one = ("matmul", "matmul-add", "packed")
    if strategy == "masked":
        apart = {"split": "LoraAdd3", "slices": "LoraAdd2"}
        assert found == masked | apart | dict.fromkeys(of_one, "LoraAdd")
    else:
        joined = {"split": "LoraLinear3", "slices": "LoraLinear2"}
        assert found == masked | joined | dict.fromkeys(of_one, "LoraLinear")
    routes = [node for node in proto.graph.node if node.op_type == "Route"]
    assert len(routes) == 2  # of rows, and of flat tokens
    for ids, slots in ((IDS, [2, 0, 1, 2]), (IDS[:1, :1], [1])):
        feeds = {"input_ids": ids, "adapter_ids": np.array(slots)}
        ys, expected = called.run(None, feeds), plain.run(None, feeds)
        assert [y.tobytes() for y in ys] == [y.tobytes() for y in expected]


def _small() -> Hand:
    hand = Hand()
    hand.matmul("/model/layers.0/mlp/down_proj/MatMul", "y", 12)
    return hand


def test_a_site_that_the_graph_lacks() -> None:
    layer = _layer("up", {"model.layers.0.mlp.up_proj": 12})
    with pytest.raises(
        BaseModelError,
        match=r"site 'model.layers.0.mlp.up_proj': the base's graph has no product of this name;"
        r" it has 1, such as layers.0.mlp.down_proj",
    ):
        find_grafts(_small().model(["y"]).graph, [layer])


@pytest.mark.parametrize(("size_in", "size_out"), [(SIZE, 16), (16, 12)])
def test_a_graph_of_another_size(size_in: int, size_out: int) -> None:
    layer = _layer("down", {"model.layers.0.mlp.down_proj": size_out}, size_in)
    with pytest.raises(
        BaseModelError,
        match=f"site 'model.layers.0.mlp.down_proj': node '/model/layers.0/mlp/down_proj/MatMul'"
        f" maps 32 to 12 features, the model {size_in} to {size_out}; the graph is of another",
    ):
        find_grafts(_small().model(["y"]).graph, [layer])


def test_products_of_different_inputs_are_no_layer() -> None:
    hand = Hand()
    hand.matmul("/model/layers.0/mlp/gate_proj/MatMul", "gate", SIZE)
    hand.matmul("/model/layers.0/mlp/up_proj/MatMul", "up", 12, x="gate")
    sites = {"model.layers.0.mlp.gate_proj": SIZE, "model.layers.0.mlp.up_proj": 12}
    with pytest.raises(
        BaseModelError, match=r"gate_proj, model.layers.0.mlp.up_proj: the graph gives them diff"
    ):
        find_grafts(hand.model(["up"]).graph, [_layer("gate_up", sites)])


def test_a_graph_whose_input_has_no_batch() -> None:
    hand = _small()
    model = hand.model(["y"])
    model.graph.inputs[0].shape = None
    layer = _layer("down", {"model.layers.0.mlp.down_proj": 12})
    stacks, _ = _fill(layer, 0)
    grafts = find_grafts(model.graph, [layer])
    with pytest.raises(ExportError, match="no input whose first dimension is the batch"):
        graft(model, grafts, stacks, SLOTS, "float32")
