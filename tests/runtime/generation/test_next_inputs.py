"""The nodes that the driven engine puts behind a decoder's logits: that they are ONNX, and that a
step leaves the next one's inputs in the memory of its own, on a decoder without layers."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from support.decoders import write_family
from support.home import Home

import loraexport_runtime as lr
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.device.dtypes import NUMPY_DTYPES, ONNX_TYPES
from loraexport_runtime.device.ort_session import open_session
from loraexport_runtime.generation.captured.decoder_graph import DecoderGraph
from loraexport_runtime.generation.captured.next_inputs import (
    LENGTHS,
    PLACES,
    ROWS,
    next_inputs,
    write_tail,
)
from loraexport_runtime.generation.captured.step import Prompts, Step

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


def _open(path: Path, dtype: str, masks: Sequence[str]) -> DecoderGraph:
    taken = ("input_ids", *masks)
    return DecoderGraph(
        session=open_session(path, CPU, {}, 1, write_tail(taken)),
        device=("cpu", 0),
        capture=False,
        inputs=frozenset({*taken, ROWS, LENGTHS, PLACES}),
        next=next_inputs(taken),
        present={},
        cache_dtype="float32",
        heads=1,
        head_size=1,
        logits_dtype=dtype,
        vocabulary=VOCABULARY,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("masks", [MASKS, MASKS[:1], ()])
def test_a_step_leaves_the_inputs_of_the_next(
    tmp_path: Path, dtype: str, masks: tuple[str, ...]
) -> None:
    """Rows of different lengths, to the last place; every input is read before it is written."""
    tables = _tables(len(masks))
    graph = _open(_write_model(tmp_path / "model.onnx", dtype, tables, masks), dtype, masks)
    lengths = np.array([3, 1, 7, 4])
    ids = np.random.default_rng(1).integers(0, VOCABULARY, (4, 7))
    step = Step(graph, {}, 4, LENGTH)
    logits = graph.allocate([4, 7, VOCABULARY], dtype)
    step.read(Prompts(ids, lengths, np.zeros(4, np.int64), 4), logits.data_ptr())
    tokens = ids[np.arange(4), lengths - 1]
    for index in range(LENGTH - 7 + 1):
        if index > 0:
            step.run()
        sums = tables["of_token"][tokens]
        if "position_ids" in masks:
            sums = sums + tables["of_position"][lengths + index - 1]
        if "attention_mask" in masks:
            sums = sums + tables["of_count"][lengths + index]
        tokens = sums.astype(NUMPY_DTYPES[dtype]).astype(np.float32).argmax(axis=1)
        assert step.tokens().tolist() == tokens.tolist(), index
        own = {name: value.numpy() for name, value in step._inputs.items()}
        assert own[LENGTHS].tolist() == (lengths[:, None] + index + 1).tolist()
        if "position_ids" in masks:
            assert own["position_ids"].tolist() == (lengths[:, None] + index).tolist()
        if "attention_mask" in masks:
            mask = np.arange(LENGTH) < lengths[:, None] + index + 1
            assert own["attention_mask"].tolist() == mask.astype(int).tolist()


def test_the_lower_of_two_tokens_that_are_equally_likely(tmp_path: Path) -> None:
    tables = _tables(0)
    tables["of_token"][:] = 0.0
    tables["of_token"][:, [9, 4, 12]] = 1.0
    graph = _open(_write_model(tmp_path / "model.onnx", "float16", tables, ()), "float16", ())
    step = Step(graph, {}, 2, LENGTH)
    step.run()
    assert step.tokens().tolist() == [4, 4]


def test_other_tokens_may_be_put_in_place_of_those_chosen(tmp_path: Path) -> None:
    tables = _tables(0)
    graph = _open(_write_model(tmp_path / "model.onnx", "float32", tables, ()), "float32", ())
    step = Step(graph, {}, 2, LENGTH)
    chosen = step.tokens()
    step.put(np.array([11, 5]))
    assert step.tokens().tolist() == [11, 5]
    assert chosen.tolist() == [0, 0]  # a copy
    step.run()
    assert step.tokens().tolist() == tables["of_token"][[11, 5]].argmax(axis=1).tolist()


@pytest.mark.parametrize("masks", [MASKS, MASKS[:1], ()])
def test_a_model_with_the_tail_is_onnx(tmp_path: Path, masks: tuple[str, ...]) -> None:
    path = _write_model(tmp_path / "model.onnx", "float16", _tables(0), masks)
    merged = onnx.load_from_string(path.read_bytes() + write_tail(masks))
    onnx.checker.check_model(merged)
    # It infers the types and shapes that the outputs say they have.
    onnx.shape_inference.infer_shapes(merged, check_type=True, strict_mode=True)
    _check(merged, onnx.load(path), masks)


def test_a_decoder_with_the_tail(home: Home) -> None:
    """One of onnxruntime-genai's builder: with operators that are not ONNX's own."""
    folder = home.artifact(write_family, "Llama") / "generator"
    taken = read_genai_config(folder)["model"]["decoder"]["inputs"].values()
    path = folder / "model.onnx"
    merged = onnx.load_from_string(path.read_bytes() + write_tail(taken))
    _check(merged, onnx.load(path, load_external_data=False), taken)


def _check(merged: onnx.ModelProto, alone: onnx.ModelProto, taken: Collection[str]) -> None:
    added = merged.graph.node[len(alone.graph.node) :]
    assert list(merged.graph.node[: len(alone.graph.node)]) == list(alone.graph.node)
    assert list(merged.opset_import) == list(alone.opset_import)
    assert merged.graph.name == alone.graph.name
    known = {one.name for one in (*alone.graph.input, *alone.graph.initializer)}
    known |= {name for node in alone.graph.node for name in node.output}
    new = [name for node in added for name in node.output] + [ROWS, LENGTHS, PLACES]
    assert len({*known, *new}) == len(known) + len(new)
    outputs = next_inputs(taken)
    given = [*(one.name for one in alone.graph.output), *outputs.values()]
    assert [one.name for one in merged.graph.output] == given
    tokens = outputs.pop("input_ids")
    for name in outputs.values():
        assert tokens in _ancestors(added, name), f"{name} may be written before the tokens"


def _ancestors(nodes: Sequence[onnx.NodeProto], name: str) -> set[str]:
    found: set[str] = {name}
    for node in reversed(nodes):
        if found & set(node.output):
            found |= set(node.input)
    return found


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(lr.ProviderError, match=r"none\.onnx: onnxruntime .* cannot open this grap"):
        open_session(tmp_path / "none.onnx", CPU, {}, None, write_tail(("input_ids",)))
