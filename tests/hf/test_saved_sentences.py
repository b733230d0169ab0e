"""Folders that sentence-transformers itself saved: what `init` writes for them gives its numbers.

tests/support/make_sentences.py makes them; expected.json has what encode() and predict() gave.
"""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter

import loraexport
import loraexport_runtime
from loraexport.errors import BaseModelError
from loraexport.pipeline.build import build
from loraexport.plan.starter import write_spec
from loraexport_runtime import WeightsError

SAVED = Path(__file__).parent / "saved"
SITES = {False: "encoder.layer.0.attention.self.query", True: "layers.0.self_attn.q_proj"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a saved folder, built of the spec that `init` writes."""

    @cache
    def make(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        return _build(shutil.copytree(SAVED / name, folder / "base"), folder)

    return make


@pytest.mark.parametrize(
    ("name", "output", "shape"),
    [
        ("chain", "sentence_embedding", ("batch", "4")),
        pytest.param(
            "without-prompt", "sentence_embedding", ("batch", "32"), marks=pytest.mark.slow
        ),
        pytest.param("last-token", "sentence_embedding", ("batch", "8"), marks=pytest.mark.slow),
        pytest.param("left", "sentence_embedding", ("batch", "40"), marks=pytest.mark.slow),
        pytest.param("reranker", "scores", ("batch", "1"), marks=pytest.mark.slow),
    ],
)
def test_a_saved_folder_gives_the_library_s_numbers(
    artifact: Callable[[str], Path], name: str, output: str, shape: tuple[str, ...]
) -> None:
    with loraexport_runtime.load_model(artifact(name)) as session:
        (entry,) = session.model.outputs
        assert (entry.name, entry.shape) == (output, shape)
        for case in _cases(name):
            inputs = _inputs(session, case)
            y = session.run(inputs)[output]
            np.testing.assert_allclose(y, np.array(case["y"]), rtol=1e-4, atol=1e-5)
            others = session.run(inputs, ["tenant"] * len(y))[output]
            assert np.abs(others - y).max() > 1e-3, "the adapter does nothing"


def test_its_prompts_are_kept_for_a_service(artifact: Callable[[str], Path]) -> None:
    folder = artifact("last-token")
    with loraexport_runtime.load_model(folder) as session:
        facts = session.model.facts
    assert facts.prompts == {"query": "w10 w12 ", "document": ""}
    assert facts.default_prompt_name == "query"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    ids = tokenizer.encode(facts.prompts["query"] + "w3").ids
    _, prompted = _cases("last-token")
    assert ids == prompted["inputs"]["input_ids"][1][-len(ids) :]


def test_a_transformer_in_a_folder_of_its_own(tmp_path: Path) -> None:
    """As before 2.0 of the library: its numbers, its tokenizer, lowercased, and its limits."""
    base = shutil.copytree(SAVED / "chain", tmp_path / "base")
    inner = base / "0_Transformer"
    inner.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (base / name).rename(inner / name)
    (base / "sentence_bert_config.json").unlink()
    text = {"max_seq_length": 12, "do_lower_case": True}
    (inner / "sentence_bert_config.json").write_text(json.dumps(text))
    modules = json.loads((base / "modules.json").read_text())
    modules[0] |= {"path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}
    (base / "modules.json").write_text(json.dumps(modules))
    built = _build(base, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(built / "tokenizer/tokenizer.json"))
    case, _ = _cases("chain")
    assert tokenizer.encode("W0 w5 W5 w9").ids == case["inputs"]["input_ids"][0][:6]
    with loraexport_runtime.load_model(built) as session:
        assert session.model.facts.max_length == 12
        y = session.run(_inputs(session, case))["sentence_embedding"]
    np.testing.assert_allclose(y, np.array(case["y"]), rtol=1e-4, atol=1e-5)


def test_weights_behind_the_model_are_part_of_the_base(
    artifact: Callable[[str], Path], tmp_path: Path
) -> None:
    base = shutil.copytree(SAVED / "chain", tmp_path / "base")
    file = base / "2_Dense/model.safetensors"
    weights = load_file(file)
    weights["linear.bias"] = weights["linear.bias"] + np.float32(0.5)
    save_file(weights, file)
    built = artifact("chain")
    assert loraexport.verify(built, base=SAVED / "chain").report.status == "passed"
    with pytest.raises(BaseModelError, match="its weights differ"):
        loraexport.verify(built, base=base)
    weights["linear.bias"][0] = np.nan
    save_file(weights, file)
    with pytest.raises(WeightsError, match=r"'linear.bias': 1 of 6 values are NaN or Inf"):
        loraexport.verify(built, base=base)


def test_heads_of_different_width_behind_a_cross_encoder(tmp_path: Path) -> None:
    """A label that a head lacks has the score 0, which is that of the lowest logit."""
    base = shutil.copytree(SAVED / "reranker", tmp_path / "base")
    generator = np.random.default_rng(0)
    heads = {}
    for name, labels in (("one", 1), ("three", 3)):
        shapes = {"weight": (labels, 8), "bias": (labels,)}
        heads[name] = {
            f"base_model.model.classifier.{part}": generator.standard_normal(shape)
            for part, shape in shapes.items()
        }
        tensors = {key: tensor.astype(np.float32) for key, tensor in heads[name].items()}
        config = {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}
        site = {f"bert.{SITES[False]}": (8, 8)}
        write_adapter(tmp_path / name, site, rank=2, config=config, tensors=tensors)
    write_spec(str(base), [tmp_path / name for name in heads], tmp_path / "spec.yaml")
    built, report = build(tmp_path / "spec.yaml", tmp_path / "out")
    assert report.status == "passed"
    (case,) = _cases("reranker")
    with loraexport_runtime.load_model(built) as session:
        scores = session.run(_inputs(session, case), ["one", "three"])["scores"]
    assert (scores[0, 1:] == 0).all()
    assert ((scores[1] > 0) & (scores[1] < 1) & (scores[1] != 0.5)).all()


def _build(base: Path, folder: Path) -> Path:
    """The artifact of the spec that `init` writes."""
    is_decoder = not (base / "2_Dense").exists() and "qwen3" in (base / "config.json").read_text()
    adapter = write_adapter(folder / "tenant", {SITES[is_decoder]: (8, 8)}, rank=2)
    write_spec(str(base), [adapter], folder / "spec.yaml")
    built, report = build(folder / "spec.yaml", folder / "out")
    assert report.status == "passed"
    return built


def _cases(name: str) -> Any:
    return json.loads((SAVED / name / "expected.json").read_text())


def _inputs(session: Any, case: Any) -> dict[str, np.ndarray]:
    inputs = {name: np.array(value) for name, value in case["inputs"].items()}
    batch = len(case["y"])
    more = {
        "token_type_ids": np.zeros_like(inputs["input_ids"]),
        "prompt_lengths": np.full(batch, case["prompt_length"]),
    }
    wanted = {entry.name for entry in session.model.inputs}
    return {name: value for name, value in (more | inputs).items() if name in wanted}
