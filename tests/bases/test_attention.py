"""The graph of a decoder at every position: windows, RoPE of every type, rows that choose for
themselves. Its logits are held to transformers' in float64, each text alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as tf
from support.decoders import CONTEXT, FAMILIES, LONGROPE, SIZES, Family, make_prompts, write_decoder

from loraexport.bases import decoder as decoder_base
from loraexport.bases.attention import choose_by_row, graph_positions, keep_whole_caches
from loraexport.errors import BaseModelError, ParityError
from loraexport.graphs.sessions import open_graph
from loraexport.hf.positions import Positions
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.generation.rope import READ_LENGTHS

HEADS, SIZE = 2, 16
TEXTS = make_prompts(40, 5, 11, 12, 13, 26)
"""On both sides of every length here, in one batch."""
BATCHES = (TEXTS, TEXTS[1:3])


def llama(**rope: Any) -> Family:
    parameters = {"rope_theta": 10000.0, **rope}
    return Family(lambda: tf.LlamaConfig(**SIZES, rope_parameters=parameters))


_OF = {"factor": 4.0, "original_max_position_embeddings": 32}
ROPES = {
    "linear": llama(rope_type="linear", factor=4.0),
    "dynamic": llama(rope_type="dynamic", factor=4.0),
    "yarn": llama(rope_type="yarn", beta_fast=16.0, beta_slow=2.0, **_OF),
    "yarn without beta_fast": llama(rope_type="yarn", **_OF),
    "yarn's attention factor": llama(rope_type="yarn", attention_factor=0.7, **_OF),
    "llama3": llama(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **_OF),
    "longrope": llama(**LONGROPE),
    "a part of a head": FAMILIES["Phi-2"],
}
WINDOWED = ("SmolLM3", "Mistral", "Qwen2 with windows", "Gemma 2", "Phi-3", "Phi-3.5")
CASES = {**ROPES, **{name: FAMILIES[name] for name in WINDOWED}}


def load_graph(folder: Path, family: Family) -> decoder_base.GenaiGraph:
    spec = write_decoder(folder, family)
    return decoder_base.load_decoder_graph(make_plan(read_spec(spec), folder))


def run(session: Any, texts: list[list[int]], **more: np.ndarray) -> np.ndarray:
    """The logits of a batch that is padded on the right."""
    longest = max(map(len, texts))
    ids, mask = np.zeros((2, len(texts), longest), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    feeds = {"input_ids": ids, "attention_mask": mask, **more}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            size = SIZE if isinstance(entry.shape[3], str) else entry.shape[3]
            feeds.setdefault(entry.name, np.zeros((len(texts), entry.shape[1], 0, size), "float32"))
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits


def expected(base: Path, text: list[int]) -> np.ndarray:
    model: Any = tf.AutoModelForCausalLM.from_pretrained(base).eval().double()
    with torch.no_grad():
        logits: np.ndarray = model(input_ids=torch.tensor([text])).logits[0].numpy()
    return logits


@pytest.mark.parametrize("name", CASES)
def test_every_position_of_every_row_is_transformers(name: str, tmp_path: Path) -> None:
    graph = load_graph(tmp_path, CASES[name])
    heads = 32 if name == "a part of a head" else SIZE
    session = open_graph(graph.model)
    past = {
        entry.name: entry.shape
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    for texts in BATCHES:
        caches = {
            key: np.zeros((len(texts), shape[1], 0, heads), "float32")
            for key, shape in past.items()
        }
        logits = run(session, texts, **caches)
        for row, text in enumerate(texts):
            wanted = expected(tmp_path / "base", text)
            error = np.abs(logits[row, : len(text)] - wanted).max() / np.abs(wanted).max()
            assert error < 1e-4, f"{len(text)} tokens among {len(texts)} rows: {error}"


def test_windows_are_of_their_layers(tmp_path: Path) -> None:
    wanted = {"Mistral": (8, 8), "Qwen2 with windows": (None, 8), "Gemma 2": (8, None)}
    for name, windows in wanted.items():
        graph = load_graph(tmp_path / name, FAMILIES[name])
        assert graph.positions == Positions(windows, None)
        assert graph_positions(graph.model).windows == windows
        attributes = [
            node.attributes for node in graph.model.graph if node.op_type == "GroupQueryAttention"
        ]
        assert not any("sliding_window_cache" in each for each in attributes)
        assert b"sliding_window" not in bytes(graph.files["genai_config.json"])  # type: ignore[arg-type]


def test_a_part_of_a_long_text_is_read_as_the_whole(tmp_path: Path) -> None:
    """The first 10 of 40 tokens, below the length of longrope's first factors."""
    session = open_graph(load_graph(tmp_path, FAMILIES["Phi-3.5"]).model)
    text = TEXTS[0]
    whole = run(session, [text])[0, :10]
    part = run(session, [text[:10], text[:10]], read_lengths=np.array([40, 0]))
    assert READ_LENGTHS == "read_lengths"
    assert np.abs(part[0] - whole).max() < 1e-4
    assert np.abs(part[1] - whole).max() > 0.1, "the factors make no difference"


def _builders_own(folder: Path, family: Family) -> ir.Model:
    """A graph as the model builder makes it, with its rings and its one choice for a batch."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    write_decoder(folder, family)
    place = ("decoder", str(folder / "base"), str(folder / "made"), "fp32", "cpu")
    options = parse_extra_options(*place, str(folder / "cache"), [])
    create_model(*place, str(folder / "cache"), **options)
    return ir.load(folder / "made/model.onnx")


def test_a_graph_that_exists_chooses_by_row(tmp_path: Path) -> None:
    model = _builders_own(tmp_path, FAMILIES["Phi-3.5"])
    assert graph_positions(model) == Positions((None, None), 12)
    alone = [run(open_graph(model.clone()), [text])[0] for text in TEXTS]
    batch = run(open_graph(model.clone()), TEXTS)
    assert np.abs(batch[1, :5] - alone[1]).max() > 0.1, "the builder's rows are alone already"
    choose_by_row(model, SIZE)
    batch = run(open_graph(model), TEXTS)
    for row, logits in enumerate(alone):
        assert np.abs(batch[row, : len(logits)] - logits).max() < 1e-4


def test_a_graph_that_exists_gets_whole_caches(tmp_path: Path) -> None:
    model = _builders_own(tmp_path, FAMILIES["Gemma 2"])
    with pytest.raises(Exception, match="KV cache capacity"):
        run(open_graph(model.clone()), TEXTS[:1])
    keep_whole_caches(model)
    wanted = expected(tmp_path / "base", TEXTS[0])
    assert np.abs(run(open_graph(model), TEXTS[:1])[0] - wanted).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "fault"),
    [("Mistral", "set_layers"), pytest.param("Phi-3.5", "places", marks=pytest.mark.slow)],
)
def test_planted_faults_of_length_fail(
    name: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that the graph lacks; factors of the longest row for all of a batch."""

    def without(model: ir.Model, positions: Positions) -> None:
        return None

    def longest(graph: ir.Graph, attention: ir.Node, length: int) -> ir.Value:
        places = make_places(graph, attention, length)
        rows = next(node for node in graph if node.name == "rotary/Add_2")
        whole = ir.node("ReduceMax", [rows.outputs[0]], {"keepdims": 1})
        graph.insert_after(rows, whole)
        rows.outputs[0].replace_all_uses_with(whole.outputs[0])
        whole.replace_input_with(0, rows.outputs[0])
        return places

    from loraexport.bases import attention

    make_places: Callable[..., ir.Value] = attention._places
    if fault == "set_layers":
        monkeypatch.setattr(decoder_base, "set_layers", without)
    else:
        monkeypatch.setattr(attention, "_places", longest)
    with pytest.raises(ParityError, match="nothing was published"):
        build(write_decoder(tmp_path, FAMILIES[name]), tmp_path / "out")


def test_a_graph_of_another_depth_is_refused() -> None:
    from loraexport.bases.attention import set_layers

    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    with pytest.raises(BaseModelError, match="0 GroupQueryAttention nodes, and the model 2 layers"):
        set_layers(model, Positions((8, 8), None))


def test_lengths_below_the_context_alone_matter() -> None:
    positions = Positions((None, 8, 200, 8), 12)
    assert positions.lengths(CONTEXT) == (8, 12)
    assert Positions((None, None), None).lengths(CONTEXT) == ()
