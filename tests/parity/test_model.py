"""Verify of a whole model finds planted faults, and repeats without the base."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from support.adapters import write_adapter
from support.builds import write_model_project, write_vit_project
from support.home import Home
from support.models import write_bert

import loraexport.bases.model as transformers_module
from loraexport.errors import BaseModelError, ParityError
from loraexport.hf.skeleton import read_skeleton
from loraexport.pipeline.build import build
from loraexport.pipeline.verify import verify_artifact
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime import AdapterError
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import Layer, Manifest
from loraexport_runtime.errors import AdapterWeightsError


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    formats = ["torchscript", "onnx"]
    return home.artifact(write_model_project, export={"formats": formats})


def test_every_implementation_and_peft_agree(artifact: Path) -> None:
    report = json.loads((artifact / "parity/parity.json").read_text())
    rows = {(row["implementation"], row["adapter"]) for row in report["rows"]}
    for name in ("eager", "peft", "torchscript-cpu", "onnx-cpu", "onnx-cpu-plain"):
        assert {"base", "sql", "chat"} == {who for one, who in rows if one == name}
    assert report["status"] == "passed"
    assert max(row["error"] for row in report["rows"]) < 1e-5
    assert all(abs(row["gain"] - 1) < 1e-4 for row in report["rows"] if row["adapter"] != "base")


def test_the_graph(artifact: Path) -> None:
    graph = onnx.load(artifact / "graphs/model.onnx")
    onnx.checker.check_model(graph)
    manifest = Manifest.read(artifact)
    stacks = [stack.name for layer in manifest.layers for stack in layer.stacks]
    names = ["input_ids", "attention_mask", "token_type_ids", "adapter_ids", *stacks]
    assert [one.name for one in graph.graph.input] == names
    assert set(stacks) <= {tensor.name for tensor in graph.graph.initializer}
    found = [node.op_type for node in graph.graph.node]
    assert found.count("MultiHeadAttention") == 2
    assert found.count("LayerNormalization") == 5
    widths = {len(layer.slices) for layer in manifest.layers}
    assert found.count("Equal") == len(widths)  # one mask for all sites of one width
    assert found.count("Where") >= len(manifest.layers)
    assert not {"If", "Loop", "Scan", "NonZero"} & set(found)
    text = graph.SerializeToString()
    assert b".py" not in text
    assert b"site-packages" not in text
    with zipfile.ZipFile(artifact / "graphs/model.ts") as archive:
        code = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".py"))
    assert b"torch.device(" not in code  # what tracing bakes in; it has to follow the inputs
    assert b"prim.device(" in code
    script = (artifact / "graphs/model.ts").read_bytes()
    assert b"site-packages" not in script
    assert str(artifact.parent).encode() not in script


def test_verify_with_and_without_the_base(artifact: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(artifact)
    base = artifact.parent.parent / "bert"
    report = verify_artifact(artifact, manifest, base)
    assert (report.status, report.reference) == ("passed", "the float64 model, merged")
    stored = verify_artifact(shutil.copytree(artifact, tmp_path / "far/away/copy"), manifest)
    assert stored.status == "passed"
    assert stored.reference.startswith("the stored cases (no base here")
    assert set(stored.skipped) == {"eager", "peft", "torchscript"}


def test_verify_refuses_another_base(artifact: Path, tmp_path: Path) -> None:
    other = write_bert(tmp_path / "other")
    from transformers import BertModel

    model = BertModel.from_pretrained(other)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight += 0.1  # no site, yet it moves the output
    model.save_pretrained(other)
    with pytest.raises(BaseModelError, match="its weights differ"):
        verify_artifact(artifact, Manifest.read(artifact), other)


@pytest.mark.parametrize(
    "fault", [pytest.param("scaling", marks=pytest.mark.slow), "slot", "transposed"]
)
def test_planted_faults_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    pack, assemble = transformers_module.pack, transformers_module.assemble

    def scaled(layer: Any, weights: Any, scale: float, *rest: Any) -> Any:
        return pack(layer, weights, scale * 1.05, *rest)

    def swapped(stack: Any, dtype: np.dtype, base_rows: Any, blocks: Any) -> np.ndarray:
        return assemble(stack, dtype, base_rows, {1: blocks[2], 2: blocks[1]})

    def transposed(layer: Any, weights: Any, scale: float, *rest: Any) -> Any:
        turned = {
            site: replace(one, b=one.b[::-1]) if one.b.shape[0] == 32 else one
            for site, one in weights.items()
        }
        return pack(layer, turned, scale, *rest)

    if fault == "slot":
        monkeypatch.setattr(transformers_module, "assemble", swapped)
    else:
        monkeypatch.setattr(
            transformers_module, "pack", scaled if fault == "scaling" else transposed
        )
    spec = write_model_project(tmp_path, export={"formats": ["onnx"]})
    with pytest.raises(ParityError, match="nothing was published"):
        build(spec, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts/tiny").exists()
    report = json.loads((tmp_path / "artifacts/tiny.failed/parity/parity.json").read_text())
    failed = {row["implementation"] for row in report["rows"] if not row["passed"]}
    assert "onnx-cpu-plain" in failed
    assert "peft" not in failed


@pytest.mark.parametrize(
    "strategy",
    [
        "augmented",
        pytest.param("segmented", marks=pytest.mark.slow),
        pytest.param("chunked", marks=pytest.mark.slow),
    ],
)
def test_every_strategy_serves_a_model(tmp_path: Path, strategy: str) -> None:
    spec = write_model_project(tmp_path, export={"formats": ["onnx"], "strategy": strategy})
    _, report = build(spec, tmp_path / "artifacts")
    assert report.status == "passed"
    assert {row.implementation for row in report.rows} >= {"eager", "onnx-cpu", "onnx-cpu-plain"}


def test_the_tolerance_of_the_spec_counts(tmp_path: Path) -> None:
    spec = write_model_project(
        tmp_path, export={"formats": ["onnx"]}, parity={"tolerance": 1e-12, "seed": 3}
    )
    with pytest.raises(ParityError, match=r"is above 1e-12 \(parity\.tolerance\)"):
        build(spec, tmp_path / "artifacts")


def test_the_gain_of_the_spec_counts_and_is_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = transformers_module.pack

    def scaled(layer: Any, weights: Any, scale: float, *rest: Any) -> Any:
        return pack(layer, weights, scale * 1.01, *rest)

    monkeypatch.setattr(transformers_module, "pack", scaled)
    parity = {"tolerance": 0.5, "gain": 2e-3}
    spec = write_model_project(tmp_path, export={"formats": ["onnx"]}, parity=parity)
    text = r"adapter '(sql|chat)', case '[\w-]+': its gain of 1\.0\d+ is off 1 by more than 2e-03"
    with pytest.raises(ParityError, match=text) as caught:
        build(spec, tmp_path / "artifacts")
    assert "error of" not in str(caught.value)
    assert "The base fails" not in str(caught.value)
    manifest = Manifest.read(tmp_path / "artifacts/tiny.failed")
    assert (manifest.parity.tolerance, manifest.parity.gain_tolerance) == (0.5, 2e-3)


def test_float16(tmp_path: Path) -> None:
    export = {"dtype": "float16", "formats": ["torchscript", "onnx"]}
    spec = write_model_project(tmp_path, export=export)
    _, report = build(spec, tmp_path / "artifacts")
    assert report.status == "passed"
    assert {row.implementation for row in report.rows} >= {"torchscript-cpu", "onnx-cpu"}


@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_images_in_a_narrow_dtype(tmp_path: Path, dtype: str) -> None:
    """The graphs take pixels in their own dtype, and the stored cases keep them so."""
    formats = ["torchscript", "onnx"]
    export = {"dtype": dtype, "strategy": "masked", "formats": formats}
    spec = write_vit_project(tmp_path, export=export, parity={"onnx": "deferred"})
    artifact, report = build(spec, tmp_path / "artifacts")
    found = {row.implementation for row in report.rows}
    onnx_too = {"onnx-cpu", "onnx-cpu-plain"} if dtype == "float16" else set()
    assert found >= {"eager", "peft", "torchscript-cpu"} | onnx_too
    manifest = Manifest.read(artifact)
    assert isinstance(manifest.kind, Model)
    assert [entry.dtype for entry in manifest.kind.inputs] == [dtype]
    (tmp_path / "vit").rename(tmp_path / "moved")
    stored = verify_artifact(artifact, manifest, torchscript=True)
    assert stored.reference.startswith("the stored cases (no base here")
    assert not stored.failures
    assert {row.implementation for row in stored.rows} == found - {"eager", "peft"}


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (tf.ViTConfig(), "sentence-embedding", "type 'vit' takes images; task .* is of texts"),
        (tf.ViTConfig(), "image-embedding", "is of clip_vision_model and siglip_vision_model, and"),
        (
            tf.BertConfig(),
            "text-embedding",
            "is of clip_text_model and siglip_text_model",
        ),
        (tf.ViTConfig(), "causal-lm", "cannot build a model of type 'vit' for task 'causal-lm'"),
        (tf.BertConfig(), "image-classification", "cannot build a model of type 'bert' for task"),
        (tf.ResNetConfig(), "feature-extraction", "its config has no image_size and num_channels"),
        (
            tf.SiglipConfig(),
            "token-classification",
            "cannot build a model of type .siglip.",
        ),
        (
            tf.VideoMAEConfig(),
            "feature-extraction",
            r"type 'videomae' does not run on pixel_values of shape \[1, 3, 224, 224\] alone",
        ),
    ],
)
def test_images_and_tasks_that_do_not_fit(
    config: Any, task: str, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=message):
        read_skeleton(tmp_path, task, "float32")


class TestPlan:
    def layers(self, folder: Path, **changes: Any) -> list[Layer]:
        plan = make_plan(read_spec(write_model_project(folder, **changes)), folder)
        return [one.layer for one in plan.layers]

    def sites(self, folder: Path, **changes: Any) -> list[str]:
        return [part.site for layer in self.layers(folder, **changes) for part in layer.slices]

    def test_sites_are_where_the_adapters_are(self, tmp_path: Path) -> None:
        assert self.sites(tmp_path) == [
            "encoder.layer.0.attention.self.query",
            "encoder.layer.0.output.dense",
            "encoder.layer.1.attention.self.query",
            "encoder.layer.1.attention.self.value",
        ]

    def test_sites_that_share_an_input_are_slices_of_one_layer(self, tmp_path: Path) -> None:
        layers = self.layers(tmp_path, sites="all-linear")
        parent = "encoder.layer.0.attention.self"
        assert [one.name for one in layers[:4]] == [
            f"{parent}.query+key+value",
            "encoder.layer.0.attention.output.dense",
            "encoder.layer.0.intermediate.dense",
            "encoder.layer.0.output.dense",
        ]
        fused = layers[0]
        assert [(part.name, part.site, part.offset, part.width) for part in fused.slices] == [
            (name, f"{parent}.{name}", 32 * index, 32)
            for index, name in enumerate(("query", "key", "value"))
        ]
        stacks = {stack.role: (stack.shape, stack.rows_per_slot) for stack in fused.stacks}
        # Augmented: W^T and the biases' 8 rows ahead of the slots.
        assert stacks == {"lora_A": ((8 + 3 * 24, 32), 24), "lora_B": ((40 + 3 * 24, 96), 24)}

    def test_sites_by_rule(self, tmp_path: Path) -> None:
        named = self.sites(tmp_path, sites=["query", "value", "output.dense"])
        assert len(named) == 2 + 2 + 4
        assert len(self.sites(tmp_path, sites="all-linear")) == 2 * 6 + 1

    def test_a_site_rule_that_matches_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(BaseModelError, match="sites: 'q_proj' is no linear layer of this"):
            self.sites(tmp_path, sites=["q_proj"])

    def test_an_adapter_beyond_the_sites(self, tmp_path: Path) -> None:
        with pytest.raises(AdapterError, match="have no site in this base"):
            self.sites(tmp_path, sites=["query"])

    @pytest.mark.parametrize("features", [None, ["dora"], ["bias", "heads"]])
    def test_features_are_places_for_later_adapters(
        self, tmp_path: Path, features: list[str] | None
    ) -> None:
        roles = {"lora_A", "lora_B"}
        roles |= {"output_scale"} if "dora" in (features or ()) else set()
        roles |= {"bias"} if "bias" in (features or ()) else set()
        for layer in self.layers(tmp_path, features=features):
            assert {stack.role for stack in layer.stacks} == roles

    def test_an_embedding_trained_whole(self, tmp_path: Path) -> None:
        spec = write_model_project(tmp_path)
        name = "embeddings.word_embeddings"
        write_adapter(
            tmp_path / "sql",
            {"encoder.layer.0.attention.self.query": (32, 32)},
            config={"modules_to_save": ["word_embeddings"]},
            tensors={f"base_model.model.{name}.weight": np.ones((60, 32), np.float32)},
        )
        expected = rf"brings '{name}', trained whole .* no torch\.nn\.Linear; only these can differ"
        with pytest.raises(AdapterError, match=expected):
            make_plan(read_spec(spec), tmp_path)

    def test_an_adapter_of_another_base_names_the_first_site_that_differs(
        self, tmp_path: Path
    ) -> None:
        spec = write_model_project(tmp_path)
        write_adapter(tmp_path / "sql", {"encoder.layer.0.attention.self.query": (64, 64)})
        with pytest.raises(AdapterError, match=r"layer\.0\.attention\.self\.query.*another base"):
            make_plan(read_spec(spec), tmp_path)


def test_a_checkpoint_of_another_task(tmp_path: Path) -> None:
    base = {"kind": "transformers", "path": "bert", "task": "sequence-classification"}
    text = r"it brings no 'classifier', and the base has none of its own"
    with pytest.raises(AdapterWeightsError, match=text):
        build(write_model_project(tmp_path, base=base), tmp_path / "artifacts")
    assert not list((tmp_path / "artifacts").glob("[!.]*"))


def test_pooling_must_be_declared(tmp_path: Path) -> None:
    base = {"kind": "transformers", "path": "bert", "task": "sentence-embedding"}
    with pytest.raises(BaseModelError, match="no pooling is declared"):
        build(write_model_project(tmp_path, base=base), tmp_path / "artifacts")


def test_no_model_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    base = {"kind": "transformers", "path": "empty", "task": "feature-extraction"}
    missing = r"empty/config\.json: no such file; give a Hugging Face model's directory"
    with pytest.raises(BaseModelError, match=missing):
        build(write_model_project(tmp_path, base=base), tmp_path / "artifacts")
    (tmp_path / "empty/config.json").write_text('{"model_type": "nope"}')
    with pytest.raises(BaseModelError, match="no model that transformers knows"):
        build(write_model_project(tmp_path, base=base), tmp_path / "artifacts")
