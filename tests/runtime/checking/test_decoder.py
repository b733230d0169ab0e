"""The command on a decoder: logits of the graph, tokens of the engine, and faults of both."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.checks import run_check, seal, swap_slots
from support.decoders import FAMILIES, write_decoder

from loraexport.pipeline.build import build
from loraexport_runtime import ProviderError
from loraexport_runtime.checking.check import check_artifact
from loraexport_runtime.checking.decoder_cases import make_cases
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.generator import TextGenerator

GRAPH = "generator/model.onnx"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    return build(write_decoder(folder, FAMILIES["Llama"]), folder / "out")[0]


@pytest.fixture
def artifact(built: Path, tmp_path: Path) -> Path:
    """An artifact to change."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


def scale_slot(folder: Path, slot: int, factor: float) -> None:
    """Multiply a slot's B in every stack of the graph, and seal the artifact."""
    model = onnx.load(folder / GRAPH)
    layers = Manifest.read(folder).layers
    stacks = {stack.name: stack for layer in layers for stack in layer.stacks}
    for tensor in model.graph.initializer:
        if tensor.name in stacks and stacks[tensor.name].role == "lora_B":
            values = numpy_helper.to_array(tensor).copy()
            values[stacks[tensor.name].rows(slot)] *= factor
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (folder / f"{GRAPH}.data").unlink()
    onnx.save(model, folder / GRAPH, save_as_external_data=True, location="model.onnx.data")
    seal(folder)


def test_it_passes_without_torch(built: Path) -> None:
    done = run_check("check", built, "--providers", "cpu", "--json")
    assert (done.code, done.err) == (0, "")
    rows = done.data["rows"]
    assert {(row["implementation"], row["site"], row["adapter"]) for row in rows} == {
        (implementation, site, adapter)
        for implementation, site in (
            ("onnx-cpu", "logits"),
            ("onnx-cpu", "rows alone"),
            ("onnx-engine-cpu", "tokens"),
        )
        for adapter in ("base", "first", "second")
    }
    assert all(row["passed"] for row in rows)


def test_batches_stay_small_with_many_adapters(built: Path) -> None:
    """Every adapter is alone and in a mixed batch, and no batch has more than 32 rows."""
    manifest = Manifest.read(built)
    (first, *_) = manifest.adapters
    adapters = tuple(replace(first, name=f"a{slot}", slot=slot) for slot in range(1, 101))
    cases = make_cases(replace(manifest, adapters=adapters))
    assert max(len(case.rows) for case in cases) == 32
    mixed = [case for case in cases if case.name.startswith("mixed")]
    assert [case.name for case in mixed] == ["mixed", "mixed-1", "mixed-2", "mixed-3"]
    rows = [slot for case in mixed for slot in case.adapter_ids.tolist()]
    assert rows == [*range(1, 101), 0, 1]
    assert all(len(case.rows) == len(case.lengths) for case in cases)


def test_a_slot_of_the_graph_that_is_off_fails(artifact: Path) -> None:
    """By 1 %, which changes hardly a token."""
    scale_slot(artifact, 1, 1.01)
    done = run_check("check", artifact, "--providers", "cpu")
    assert done.code == 3
    assert "Worst: onnx-cpu, layer 'causal-lm', site 'logits', adapter 'first'" in done.err
    failed = {(row.site, row.adapter) for row in check_artifact(artifact, ["cpu"]).failures}
    assert failed == {("logits", "first")}


def test_slots_in_another_order_fail(artifact: Path) -> None:
    swap_slots(artifact)
    report = check_artifact(artifact, ["cpu"])
    assert {row.adapter for row in report.failures} == {"first", "second"}
    assert {row.site for row in report.failures} == {"logits", "tokens"}


def test_tokens_that_no_rounding_explains_fail(
    built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that gives every row the base's tokens."""
    greedy = TextGenerator.greedy

    def mutated(self: TextGenerator, prompts: Any, adapters: Any, steps: int) -> np.ndarray:
        return greedy(self, prompts, [None] * len(prompts), steps)

    monkeypatch.setattr(TextGenerator, "greedy", mutated)
    report = check_artifact(built, ["cpu"])
    assert {(row.site, row.adapter) for row in report.failures} == {
        ("tokens", "first"),
        ("tokens", "second"),
    }


def test_without_tokenizers_it_does_not_pass(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ProviderError, match="generation needs tokenizers: pip install"):
        check_artifact(built, ["cpu"])
