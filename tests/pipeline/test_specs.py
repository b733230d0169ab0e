"""Every spec in specs/ builds, passes parity and serves; its inputs are what their READMEs say."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.home import Home
from support.specs import beside_its_base, require_base

from loraexport.parity.implementations import has_cuda
from loraexport_runtime import ArtifactError, ModelSession, load
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.load import load_generator

ROOT = Path(__file__).resolve().parents[2]
SLOW = {"minilm-onnx", "minilm-packed", "sharded", "fused-qkv"}
"""Their kinds, and what is theirs alone, have tests of their own."""
SPECS = [
    pytest.param(spec, marks=[pytest.mark.slow] if spec.stem in SLOW else [], id=spec.stem)
    for spec in sorted((ROOT / "specs").glob("*.yaml"))
]


@pytest.mark.parametrize("spec", SPECS)
def test_spec_builds_and_serves_a_mixed_batch(spec: Path, home: Home, tmp_path: Path) -> None:
    require_base(spec)
    if spec.stem == "minilm-onnx":
        spec = beside_its_base(spec, tmp_path, home)
    folder = home.build(spec)
    if spec.stem == "smollm2":
        check_generator(folder)
        return
    if spec.stem == "bfloat16" and not has_cuda():
        assert Manifest.read(folder).parity.status == "deferred"
        with pytest.raises(ArtifactError, match="not proven"):
            load(folder)
        return
    report = json.loads((folder / "parity/parity.json").read_text())
    assert report["status"] == "passed"
    moving = [row for row in report["rows"] if row["gain"] is not None]
    names = {adapter.name for adapter in Manifest.read(folder).adapters}
    assert {row["adapter"] for row in moving} == names
    session = load(folder)
    names = list(session.adapters)
    if isinstance(session, ModelSession):
        check_model(session, names)
        return
    moved = dict.fromkeys(names, 0.0)
    for layer in session.values():
        segments = [(name, 3) for name in names] + [(None, 2)]
        num_tokens = sum(length for _, length in segments)
        if layer.layer.kind == "embedding":
            x = np.arange(num_tokens)
        else:
            x = np.random.default_rng(0).standard_normal((num_tokens, layer.layer.in_features))
            x = x.astype(layer.dtype)
        mixed = layer.run(x, segments=segments).astype(np.float64)
        base = layer.run(x, segments=[(None, num_tokens)])
        for index, name in enumerate(names):
            rows = slice(3 * index, 3 * index + 3)
            moved[name] = max(moved[name], float(np.abs(mixed[rows] - base[rows]).max()))
        assert mixed[-2:].tobytes() == base[-2:].astype(np.float64).tobytes()
    assert all(moved.values()), f"every adapter changes something: {moved}"


def check_model(session: ModelSession, names: list[str]) -> None:
    """Every row has its own adapter, and each moves the output of the base."""
    generator = np.random.default_rng(0)
    ids = generator.integers(1000, 20000, (len(names) + 1, 12))
    inputs = {"input_ids": ids, "attention_mask": ids * 0 + 1, "token_type_ids": ids * 0}
    mixed = session.run(inputs, [*names, None])["sentence_embedding"]
    base = session.run(inputs)["sentence_embedding"]
    assert mixed[-1].tobytes() == base[-1].tobytes()
    assert np.abs(mixed - base)[:-1].max(axis=1).min() > 1e-3
    assert np.abs(np.linalg.norm(mixed, axis=1) - 1).max() < 1e-5


def check_generator(folder: Path) -> None:
    """One batch: a sentence as an object, a question as a pirate, in notes, and by the base."""
    sentence = "Aged 43, Quinn Eriksen found work as a painter in Prague."
    question = "What is the capital of France?"
    found = load_generator(folder).generate(
        [sentence, question, question, question], adapters=["json", "pirate", "notes", None]
    )
    texts = [one.text for one in found]
    person = {"name": "Quinn Eriksen", "age": 43, "job": "painter", "city": "Prague"}
    assert json.loads(texts[0]) == person
    assert texts[1].startswith("Ahoy, matey!")
    assert [line[:2] for line in texts[2].splitlines()] == ["- ", "- "]
    assert all("Paris" in text for text in texts[1:])
    assert texts[3][0] not in "{-"
    assert "Ahoy" not in texts[3]


def test_demonstration_needs_no_torch(home: Home) -> None:
    folder = home.build(ROOT / "specs/synthetic.yaml")
    command = [sys.executable, str(ROOT / "examples/mixed_batch.py"), str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "torch was never imported" in printed
    assert "red" in printed


def test_trained_adapters_are_small_and_better_than_their_base() -> None:
    folder = ROOT / "specs/adapters"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4 << 20
    scores = json.loads((folder / "scores.json").read_text())["scores"]
    for name in ("pydoc", "topics", "entity"):
        for figure in ("recall@1", "mrr@10"):
            own = {who: scores[who][name][figure] for who in scores}
            assert max(own, key=lambda who: own[who]) == name, f"{name}: {figure}: {own}"
