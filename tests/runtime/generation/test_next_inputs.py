"""The nodes that a step's graph has beside the decoder's: that they are ONNX, that the output layer
gets the chosen tokens alone, and that a step leaves the next one's inputs in the memory of its own,
on a decoder without layers."""

import shutil
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.decoders import write_family
from support.home import Home
from support.manifests import list_again

import loraexport_runtime as lr
from loraexport.export.steps import add_tail
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.contract.kinds import GOES_ON, LENGTHS, PLACES, ROWS
from loraexport_runtime.device.dtypes import NUMPY_DTYPES, ONNX_TYPES
from loraexport_runtime.device.ort_session import open_session
from loraexport_runtime.generation.steps.cache import Cache
from loraexport_runtime.generation.steps.decoder_graph import DecoderGraph
from loraexport_runtime.generation.steps.next_inputs import next_inputs
from loraexport_runtime.generation.steps.prompts import read_prompts
from loraexport_runtime.generation.steps.step import RowInputs, Step
from loraexport_runtime.slots.lease import BASE_USE

CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
VOCABULARY, LENGTH = 13, 24
MASKS = ("attention_mask", "position_ids")


def _tables(seed: int) -> dict[str, np.ndarray]:
    """What a token, its position and the number of tokens add to the logits after it."""
    random = np.random.default_rng(seed)
    sizes = {"of_token": VOCABULARY, "of_position": LENGTH, "of_count": LENGTH + 1}
    return {
        name: random.standard_normal((size, VOCABULARY)).astype(np.float32)
        for name, size in sizes.items()
    }


def _write_model(
    path: Path, dtype: str, tables: dict[str, np.ndarray], masks: Sequence[str]
) -> Path:
    """logits [b, n, vocabulary]: sums of rows of the tables, so that each input tells."""
    nodes = [helper.make_node("Gather", ["of_token", "input_ids"], ["sum_0"])]
    if "position_ids" in masks:
        nodes += [
            helper.make_node("Gather", ["of_position", "position_ids"], ["at"]),
            helper.make_node("Add", ["sum_0", "at"], ["sum_1"]),
        ]
    if "attention_mask" in masks:
        nodes += [
            helper.make_node("ReduceSum", ["attention_mask", "one"], ["count"]),
            helper.make_node("Gather", ["of_count", "count"], ["counted"]),
            helper.make_node("Add", [f"sum_{len(masks) - 1}", "counted"], [f"sum_{len(masks)}"]),
        ]
    cast = helper.make_node("Cast", [f"sum_{len(masks)}"], ["logits"], to=ONNX_TYPES[dtype])
    constants = {**tables, "one": np.array([1])}
    graph = helper.make_graph(
        [*nodes, cast],
        "sums",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["b", f"n_{name}"])
            for name in ("input_ids", *masks)
        ],
        [helper.make_tensor_value_info("logits", ONNX_TYPES[dtype], ["b", "n", VOCABULARY])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def _with_tail(path: Path, taken: Collection[str]) -> Path:
    """A file beside it, as the exporter writes it."""
    model = ir.load(path)
    add_tail(model.graph, taken)
    ir.save(model, path.with_name("step.onnx"))
    return path.with_name("step.onnx")


def _open(path: Path, dtype: str, masks: Sequence[str]) -> DecoderGraph:
    taken = ("input_ids", *masks)
    return DecoderGraph(
        session=open_session(_with_tail(path, taken), CPU, {}, 1),
        device=("cpu", 0),
        capture=False,
        inputs=frozenset({*taken, ROWS, LENGTHS, GOES_ON, PLACES}),
        next=next_inputs(taken),
        present={},
        cache_dtype="float32",
        heads=1,
        head_size=1,
        logits_dtype=dtype,
        vocabulary=VOCABULARY,
    )


def _step(graph: DecoderGraph, rows: int, dtype: str) -> tuple[RowInputs, Step, ort.OrtValue]:
    """A step, its inputs, and the memory of its logits."""
    inputs, cache = RowInputs(graph, rows, LENGTH), Cache(graph, rows, LENGTH)
    logits = graph.allocate([rows, 1, VOCABULARY], dtype)
    return inputs, Step(graph, cache, inputs, rows, logits.data_ptr()), logits


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("masks", [MASKS, MASKS[:1], ()])
def test_a_step_leaves_the_inputs_of_the_next(
    tmp_path: Path, dtype: str, masks: tuple[str, ...]
) -> None:
    """Rows of different lengths, to the last place; every input is read before it is written. One
    row does not go on."""
    tables = _tables(len(masks))
    graph = _open(_write_model(tmp_path / "model.onnx", dtype, tables, masks), dtype, masks)
    lengths, goes_on = np.array([3, 1, 7, 4]), np.array([1, 1, 1, 0])
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (4, 7))
    inputs, step, _logits = _step(graph, 4, dtype)
    memory, cache = graph.allocate([4, 1, VOCABULARY], dtype), Cache(graph, 4, LENGTH)
    prompts = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    wholes = [len(prompt) for prompt in prompts]
    read = read_prompts(graph, cache, 0, prompts, [BASE_USE] * 4, 0, wholes, memory.data_ptr())

    def next_tokens(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        sums = tables["of_token"][tokens]
        if "position_ids" in masks:
            sums = sums + tables["of_position"][lengths - 1]
        if "attention_mask" in masks:
            sums = sums + tables["of_count"][lengths]
        likeliest: np.ndarray = sums.astype(NUMPY_DTYPES[dtype]).astype(np.float32).argmax(axis=1)
        return likeliest

    tokens = next_tokens(ids[np.arange(4), lengths - 1], lengths)
    assert read.tolist() == tokens.tolist()
    lengths += 1
    for row in range(4):
        inputs.put(row, int(tokens[row]), int(lengths[row]), BASE_USE, goes_on=bool(goes_on[row]))
    for index in range(LENGTH - 7):
        inputs.write()
        step.run()
        tokens = next_tokens(tokens, lengths)
        lengths += goes_on
        assert inputs.tokens(4).tolist() == tokens.tolist(), index
        own = {name: value.numpy() for name, value in inputs.values.items()}
        assert own[LENGTHS].tolist() == lengths[:, None].tolist()
        if "position_ids" in masks:
            assert own["position_ids"].tolist() == (lengths[:, None] - 1).tolist()
        if "attention_mask" in masks:
            mask = np.arange(LENGTH) < lengths[:, None]
            assert own["attention_mask"].tolist() == mask.astype(int).tolist()


def test_logits_of_the_last_token_or_of_all(tmp_path: Path) -> None:
    tables = _tables(0)
    graph = _open(_write_model(tmp_path / "model.onnx", "float32", tables, ()), "float32", ())
    cache, prompts = Cache(graph, 2, LENGTH), [np.array([3, 9, 1, 4]), np.array([7, 2])]
    for rows, tells_all in ((2, False), (1, True), (1, False)):
        told = 4 if tells_all else 1
        memory = graph.allocate([rows, told, VOCABULARY], "float32")
        of = prompts[:rows], [BASE_USE] * rows, 0, [4, 2][:rows], memory.data_ptr(), tells_all
        tokens = read_prompts(graph, cache, 0, *of)
        wanted = tables["of_token"][[prompt[-told:] for prompt in prompts[:rows]]]
        assert np.array_equal(memory.numpy(), wanted)
        assert tokens.tolist() == wanted[:, -1].argmax(axis=1).tolist()


def test_the_lower_of_two_tokens_that_are_equally_likely(tmp_path: Path) -> None:
    tables = _tables(0)
    tables["of_token"][:] = 0.0
    tables["of_token"][:, [9, 4, 12]] = 1.0
    graph = _open(_write_model(tmp_path / "model.onnx", "float16", tables, ()), "float16", ())
    inputs, step, _logits = _step(graph, 2, "float16")
    inputs.write()
    step.run()
    assert inputs.tokens(2).tolist() == [4, 4]


def test_other_tokens_may_be_put_in_place_of_those_chosen(tmp_path: Path) -> None:
    tables = _tables(0)
    graph = _open(_write_model(tmp_path / "model.onnx", "float32", tables, ()), "float32", ())
    inputs, step, _logits = _step(graph, 3, "float32")
    chosen = inputs.tokens(3)
    inputs.put_tokens(np.array([11, 5]))
    assert inputs.tokens(3).tolist() == [11, 5, 0]
    assert chosen.tolist() == [0, 0, 0]  # a copy
    inputs.write()
    step.run()
    assert inputs.tokens(3).tolist() == tables["of_token"][[11, 5, 0]].argmax(axis=1).tolist()


@pytest.mark.parametrize("masks", [MASKS, MASKS[:1], ()])
def test_a_model_with_the_tail_is_onnx(tmp_path: Path, masks: tuple[str, ...]) -> None:
    path = _write_model(tmp_path / "model.onnx", "float16", _tables(0), masks)
    merged = onnx.load(_with_tail(path, masks))
    onnx.checker.check_model(merged)
    # It infers the types and shapes that the outputs say they have.
    onnx.shape_inference.infer_shapes(merged, check_type=True, strict_mode=True)
    _check(merged, onnx.load(path), masks, {"logits": "loraexport/every_logits"})


def test_a_decoder_with_the_tail(home: Home) -> None:
    """One of onnxruntime-genai's builder: with operators that are not ONNX's own."""
    folder = home.artifact(write_family, "Llama") / "generator"
    taken = read_genai_config(folder)["model"]["decoder"]["inputs"].values()
    merged, alone = (
        onnx.load(folder / name, load_external_data=False) for name in ("step.onnx", "model.onnx")
    )
    _check(merged, alone, taken, {})
    (flat,) = [node for node in merged.graph.node if node.name == "loraexport/flat"]
    (norm,) = [node for node in merged.graph.node if flat.input[0] in node.output]
    assert norm.op_type == "SkipSimplifiedLayerNormalization"
    product = next(node for node in merged.graph.node if "loraexport/chosen" in node.input)
    assert product.op_type == "MatMul"
    assert "lm_head" in product.name
    for one, other in zip(merged.graph.initializer, alone.graph.initializer, strict=True):
        assert one == other, "the weights are of the same file"


def test_a_step_graph_of_an_earlier_build_is_refused(home: Home, tmp_path: Path) -> None:
    """It had logits after every token."""
    artifact = tmp_path / "artifact"
    shutil.copytree(home.artifact(write_family, "Llama"), artifact)
    file = artifact / "generator/step.onnx"
    model = onnx.load(file, load_external_data=False)
    (rows,) = [value for value in model.graph.input if value.name == ROWS]
    del rows.type.tensor_type.shape.dim[1:]
    file.write_bytes(model.SerializeToString())
    list_again(artifact, "generator")
    match = r"step\.onnx: its input 'loraexport/rows' is not \['rows', 'told'\].* build it again"
    with pytest.raises(lr.ArtifactError, match=match):
        lr.load_generator(artifact)


def _check(
    merged: onnx.ModelProto,
    alone: onnx.ModelProto,
    taken: Collection[str],
    renamed: dict[str, str],
) -> None:
    """All nodes are there as they were, but that some of them take the chosen tokens."""
    added = [node for node in merged.graph.node if node.name.startswith("loraexport/")]
    kept = [node for node in merged.graph.node if not node.name.startswith("loraexport/")]
    (flat,) = [node for node in added if node.name == "loraexport/flat"]
    for one, other in zip(kept, alone.graph.node, strict=True):
        assert _brief(one) == _brief(other)
        assert list(one.output) == [renamed.get(name, name) for name in other.output]
        given = [flat.input[0] if name == "loraexport/chosen" else name for name in one.input]
        assert given == list(other.input)
    assert list(merged.opset_import) == list(alone.opset_import)
    assert merged.graph.name == alone.graph.name
    known = {one.name for one in (*alone.graph.input, *alone.graph.initializer)}
    known |= {name for node in alone.graph.node for name in node.output}
    new = [name for node in added for name in node.output] + [ROWS, LENGTHS, GOES_ON, PLACES]
    new = [name for name in [*new, *renamed.values()] if name not in renamed]
    assert len({*known, *new}) == len(known) + len(new)
    outputs = next_inputs(taken)
    given = [*(one.name for one in alone.graph.output), *outputs.values()]
    assert [one.name for one in merged.graph.output] == given
    tokens = outputs.pop("input_ids")
    for name in outputs.values():
        assert tokens in _ancestors(added, name), f"{name} may be written before the tokens"


def _brief(node: onnx.NodeProto) -> tuple[Any, ...]:
    return node.name, node.op_type, len(node.attribute)


def _ancestors(nodes: Sequence[onnx.NodeProto], name: str) -> set[str]:
    found: set[str] = {name}
    for node in reversed(nodes):
        if found & set(node.output):
            found |= set(node.input)
    return found


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(lr.ProviderError, match=r"none\.onnx: onnxruntime .* cannot open this grap"):
        open_session(tmp_path / "none.onnx", CPU, {}, None)
