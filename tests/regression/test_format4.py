"""Artifacts of format 4 open, and give what was stored with them."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import loraexport_runtime as lr
from loraexport.artifact import mark_verified
from loraexport_runtime.contract.files import MANIFEST_FILE
from loraexport_runtime.contract.kinds import Decoder, Graph, Layers, Model
from loraexport_runtime.contract.manifest import Manifest, ParitySummary
from loraexport_runtime.generation.generator import TextGenerator
from loraexport_runtime.generation.load import load_generator

ARTIFACTS = Path(__file__).parent / "format4"
BETWEEN_VERSIONS = 1e-5
"""Another onnxruntime may sum in another order: of max |y|."""


def read_cases(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """The stored arrays by case (of layers: by layer), and by the rest of their names."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    for name, array in load_file(folder / "parity/cases.safetensors").items():
        case, _, rest = name.partition("/")
        cases.setdefault(case, {})[rest] = array
    return cases


def assert_close(y: np.ndarray, expected: np.ndarray, where: object) -> None:
    assert y.shape == expected.shape, where
    assert np.abs(y - expected).max() <= BETWEEN_VERSIONS * np.abs(expected).max(), where


def test_each_is_of_its_kind() -> None:
    kinds = {name: Manifest.read(ARTIFACTS / name).kind for name in ("layers", "model", "decoder")}
    assert kinds["layers"] == Layers()
    assert isinstance(kinds["model"], Model)
    assert kinds["model"].task == "feature-extraction"
    assert kinds["model"].facts.id2label == {}
    assert kinds["decoder"] == Decoder(
        "generator", "generator/model.onnx", False, None, None, (), None, None
    )


def test_layers_give_what_was_stored() -> None:
    session = lr.load(ARTIFACTS / "layers", threads=1)
    assert isinstance(session, lr.LayersSession)
    cases = read_cases(ARTIFACTS / "layers")
    assert set(session) == set(cases) == {"qkv", "up", "words"}
    moved = set()
    for layer, arrays in cases.items():
        x, base = arrays["x"], arrays["y/"]
        assert_close(session[layer].run(x, segments=[(None, len(x))]), base, (layer, "base"))
        for adapter in ("sql", "chat"):
            expected = arrays[f"y/alone-{adapter}"]
            y = session[layer].run(x[:9], segments=[(adapter, 6), (adapter, 3)])
            assert_close(y, expected, (layer, adapter))
            if np.abs(expected - base[:9]).max() > 0.1:
                moved.add((layer, adapter))
    assert moved == {("qkv", "sql"), ("qkv", "chat"), ("up", "sql")}


def test_an_adapter_that_does_not_start_loaded_is_paged_in() -> None:
    session = lr.load(ARTIFACTS / "layers", threads=1)
    assert isinstance(session, lr.LayersSession)
    arrays = read_cases(ARTIFACTS / "layers")["words"]
    ids, base = arrays["x"], arrays["y/"]
    y = session["words"].run(ids, segments=[("spare", 3), (None, len(ids) - 3)])
    assert np.abs(y[:3] - base[:3]).max() > 0.1
    assert_close(y[3:], base[3:], "base")


def test_a_model_gives_what_was_stored() -> None:
    session = lr.load(ARTIFACTS / "model", threads=1)
    assert isinstance(session, lr.ModelSession)
    rows = {
        "alone-sql": ["sql", "sql"],
        "alone-chat": ["chat", "chat"],
        "mixed": ["sql", "chat", None, "sql"],
        "mixed-left": ["sql", None, "chat", "sql"],
        "base-only": [None, None],
        "one-row": ["chat"],
    }
    cases = read_cases(ARTIFACTS / "model")
    assert set(cases) == set(rows)
    for name, arrays in cases.items():
        inputs = {key[2:]: array for key, array in arrays.items() if key.startswith("x/")}
        y = session.run(inputs, adapters=rows[name])["last_hidden_state"]
        kept = inputs["attention_mask"] == 1
        assert_close(y[kept], arrays["y/last_hidden_state"][kept], name)


def test_a_decoder_generates_what_was_stored() -> None:
    generator = load_generator(ARTIFACTS / "decoder")
    cases = read_cases(ARTIFACTS / "decoder")
    del cases["columns"]
    rows = {
        "alone-first": ["first", "first"],
        "alone-second": ["second", "second"],
        "mixed": ["first", "second", None, "first"],
        "base-only": [None, None],
        "one-prompt": ["second"],
    }
    assert set(cases) == set(rows)
    for name, arrays in cases.items():
        prompts = [arrays[f"x/{row}"].tolist() for row in range(len(rows[name]))]
        tokens = generator.greedy(prompts, rows[name], arrays["tokens"].shape[1])
        for row, expected in zip(tokens.tolist(), arrays["tokens"].tolist(), strict=True):
            ends = [at for at, token in enumerate(expected) if token in generator.ends]
            end = ends[0] + 1 if ends else len(expected)
            assert row[:end] == expected[:end], name


def test_a_decoder_draws_and_tells_what_a_new_one_would() -> None:
    """It has no graphs for that: its logits come to the host, of steps and of prompts."""
    prompt = [5, 9, 17, 4, 30]
    with load_generator(ARTIFACTS / "decoder") as generator:
        greedy = generator.greedy([prompt], ["first"], 6)[0].tolist()
        likely = generator.engine.submit(
            lr.GenerationRequest(tokens=prompt, adapter="first", max_tokens=6, logprobs=2)
        ).result(60.0)
        told = likely.answers[0].tokens
        assert [one.token for one in told] == greedy[: len(told)]
        assert all(one.likeliest[0][0] == one.token for one in told)
        options = {"temperature": 1.5, "top_k": 4, "seed": 3, "max_new_tokens": 6}
        drawn = generator.generate([prompt] * 2, ["first", None], **options)
        again = generator.generate([prompt, prompt], ["first", None], **options)
        assert drawn == again
        assert drawn[0].tokens != tuple(greedy)


def test_a_decoder_of_format_4_has_no_captured_steps() -> None:
    manifest = Manifest.read(ARTIFACTS / "decoder")
    assert isinstance(manifest.kind, Decoder)
    pairs: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
    with pytest.raises(lr.ProviderError, match="it is of format 4, whose steps cannot be captured"):
        TextGenerator(ARTIFACTS / "decoder", manifest, manifest.kind, pairs, cuda_graphs=True)


def test_a_graph_of_format_4_is_used_as_a_model(tmp_path: Path) -> None:
    """Kind onnx had a model, or a generator, as they were."""
    folder = edited(tmp_path, "model", lambda data: data.update(kind="onnx"))
    kind = Manifest.read(folder).kind
    assert isinstance(kind, Graph)
    assert kind.model == Manifest.read(ARTIFACTS / "model").kind
    assert isinstance(lr.load(folder, threads=1), lr.ModelSession)
    folder = edited(tmp_path, "decoder", lambda data: data.update(kind="onnx"))
    assert isinstance(Manifest.read(folder).kind, Decoder)


def edited(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of an artifact whose manifest is changed."""
    whole = Path(shutil.copytree(ARTIFACTS / name, folder / name, dirs_exist_ok=True))
    data = json.loads((ARTIFACTS / name / MANIFEST_FILE).read_text(encoding="utf-8"))
    change(data)
    (whole / MANIFEST_FILE).write_text(json.dumps(data), encoding="utf-8")
    return whole


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("layers", {"kind": "transformers"}, "layers alone does not fit kind 'transformers'"),
        ("model", {"kind": "layers"}, "model does not fit kind 'layers'"),
        ("model", {"generator": {}}, "model and generator does not fit kind 'transformers'"),
        ("decoder", {"kind": "transformers"}, "generator does not fit kind 'transformers'"),
        ("layers", {"kind": "vision"}, "manifest.kind: expected one of ('layers', "),
        (
            "layers",
            {"kind": ["layers"]},
            "manifest.kind: expected one of ('layers', ",
        ),
        ("model", {"model": 3}, "manifest.kind.model: expected an object, got 3"),
        ("layers", {"extra": 1}, "manifest: unknown key 'extra'"),
        ("layers", {"num_slots": "2"}, "manifest.num_slots: expected int, got '2'"),
    ],
)
def test_what_contradicts_itself_is_refused(
    name: str, change: dict[str, Any], text: str, tmp_path: Path
) -> None:
    folder = edited(tmp_path, name, lambda data: data.update(copy.deepcopy(change)))
    with pytest.raises(lr.ArtifactError, match=re.escape(text) + ".*build the artifact again"):
        Manifest.read(folder)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    folder = edited(tmp_path, "model", lambda data: data.pop("generator"))
    with pytest.raises(lr.ArtifactError, match="manifest: key 'generator' is missing; build the"):
        Manifest.read(folder)


def test_marked_as_verified_it_stays_of_its_format(tmp_path: Path) -> None:
    folder = edited(tmp_path, "layers", lambda data: data["parity"].update(status="deferred"))
    manifest = Manifest.read(folder)
    mark_verified(folder, manifest, ParitySummary("passed", ("onnx-cuda",), 0.25, 1.0))
    data = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert (data["format_version"], data["kind"]) == (4, "layers")
    assert lr.load(folder, threads=1).manifest.parity.checked == ("onnx-cuda",)
