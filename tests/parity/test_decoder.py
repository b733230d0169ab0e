"""Whole decoders on onnxruntime-genai: every family of the docs against PEFT's own generate, a
batch with its own adapter for every prompt, and planted faults."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from support.decoders import (
    ADAPTERS,
    FAMILIES,
    Family,
    Peft,
    make_prompts,
    write_decoder,
    write_family,
    write_tokenizer,
)
from support.home import Home
from tokenizers import Tokenizer

from loraexport.bases import adapters as packed_adapters
from loraexport.errors import BaseModelError, ParityError
from loraexport.pipeline.build import build
from loraexport.pipeline.verify import verify_artifact
from loraexport_runtime.checking.decoder_cases import STEPS, load_reference
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.generator import TextGenerator
from loraexport_runtime.generation.load import load_generator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def artifact(home: Home) -> Path:
    """Llama's, with a tokenizer. Copy it before you change a file of it."""
    return home.artifact(write_family, "Llama")


@pytest.fixture(scope="module")
def generator(artifact: Path) -> TextGenerator:
    return load_generator(artifact)


FAST = ("Llama",)
"""The family whose artifact other tests take too."""
IMPLEMENTATIONS = ("peft", "onnx-cpu", "onnx-engine-cpu", "onnx-genai-cpu")


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_a_family(name: str, home: Home) -> None:
    """Parity passes, and a mixed batch gives token for token what PEFT gives for each prompt."""
    artifact = home.artifact(write_family, name)
    manifest = Manifest.read(artifact)
    assert manifest.parity.status == "passed"
    assert set(manifest.parity.checked) >= set(IMPLEMENTATIONS)  # more with a CUDA device
    report = json.loads((artifact / "parity/parity.json").read_text())
    assert {row["adapter"] for row in report["rows"]} == {"base", *ADAPTERS}
    logits = [row for row in report["rows"] if row["site"] == "logits"]
    assert max(row["error"] for row in report["rows"]) < 1e-4
    assert {row["site"] for row in report["rows"]} == {"logits", "rows alone", "tokens"}
    assert isinstance(manifest.kind, Decoder)
    assert manifest.kind.lengths == FAMILIES[name].lengths
    cases = load_reference(artifact, manifest).prompts
    for length in manifest.kind.lengths:
        crosses, short, beyond = map(len, cases[f"across-{length}"])
        assert short < length < beyond
        assert crosses < length
        assert length < crosses + STEPS, "it does not cross while it generates"
    step = onnx.load(artifact / manifest.kind.folder / "step.onnx", load_external_data=False)
    (flat,) = [node for node in step.graph.node if node.name == "loraexport/flat"]
    assert "norm" in flat.input[0], "the output layer computes every token of a prompt"
    moved = [row for row in logits if row["adapter"] != "base"]
    assert all(abs(row["gain"] - 1) < 1e-3 and row["moved"] > 0.05 for row in moved)

    prompts = make_prompts(3, 11, 6, 7, 4, 9)
    adapters = ["second", "first", None, "first", "second", None]
    found = load_generator(artifact).generate(prompts, adapters=adapters, max_new_tokens=12)
    peft = Peft(artifact.parents[1])
    for index, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        expected = peft.generate(prompt, adapter, 12)
        assert found[index].tokens == expected, f"row {index}, adapter {adapter}"
        assert found[index].finish_reason == ("length" if len(expected) == 12 else "stop")
        others = {who: peft.generate(prompt, who, 12) for who in (None, *ADAPTERS)}
        assert len(set(others.values())) == 3, f"row {index}: an adapter changes no token"


def test_the_docs_name_these_decoders() -> None:
    text = (ROOT / "docs/guides/generation.md").read_text(encoding="utf-8")
    section = text.split("\n## Decoders\n", 1)[1].split("\n## ", 1)[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    rows = ["| decoder | proven across | notes |", "| --- | --- | --- |"]
    rows += [
        f"| {name} | {', '.join(map(str, family.lengths)) or 'no such length'} | {family.notes} |"
        for name, family in FAMILIES.items()
    ]
    assert table == rows, "write this into docs/guides/generation.md:\n" + "\n".join(rows)


def test_the_artifact(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    decoder = manifest.kind
    assert isinstance(decoder, Decoder)
    assert (decoder.folder, decoder.onnx) == ("generator", "generator/model.onnx")
    config = read_genai_config(artifact / decoder.folder)["model"]
    assert decoder.max_length == config["context_length"]
    assert decoder.vocab_size == config["vocab_size"]
    assert {"generator/model.onnx.data", "generator/genai_config.json"} <= set(manifest.files)
    assert any(name.startswith("onnxruntime-genai") for name in manifest.tools)
    assert {layer.strategy for layer in manifest.layers} == {"augmented"}
    assert all(layer.onnx is None and layer.base_rows is None for layer in manifest.layers)
    names = [[part.name for part in layer.slices] for layer in manifest.layers[:4]]
    assert names == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    model = onnx.load(artifact / decoder.onnx, load_external_data=False)
    assert not model.functions
    assert {entry.domain for entry in model.opset_import} == {"", "com.microsoft"}
    taken = {one.name: one for one in model.graph.input}
    stacks = {stack.name for layer in manifest.layers for stack in layer.stacks}
    assert {"input_ids", "attention_mask", "adapter_ids", *stacks} <= set(taken)
    assert stacks <= {tensor.name for tensor in model.graph.initializer}
    place = str(artifact.parents[1])
    for file in ("genai_config.json", "model.onnx", "model.onnx.data"):
        assert place.encode() not in (artifact / "generator" / file).read_bytes()


# int4


@pytest.fixture(scope="module")
def int4(home: Home) -> Path:
    """Llama's with an int4 base."""
    base = {"kind": "causal_lm", "path": "base", "weights": "int4"}
    return home.artifact(write_family, "Llama", base=base)


def test_an_int4_base_is_held_to_itself(int4: Path) -> None:
    """Its own graph with float LoRA is the reference, and the report says so."""
    report = json.loads((int4 / "parity/parity.json").read_text())
    assert report["status"] == "passed"
    assert report["reference"] == "the base's own graph, the adapter's product added in float64"
    assert report["skipped"] == {"peft": "its base has float weights, the graph's are int4"}
    logits = [row for row in report["rows"] if row["site"] == "logits"]
    assert {row["implementation"] for row in logits} >= {"onnx-cpu"}
    assert all(row["error"] < 1e-4 for row in logits)
    moved = [row for row in logits if row["adapter"] != "base"]
    assert all(abs(row["gain"] - 1) < 1e-3 and row["moved"] > 0.05 for row in moved)
    kinds = [node.op_type for node in onnx.load(int4 / "generator/model.onnx").graph.node]
    products = 2 * 5 + 1  # q, k and v are packed; the output layer
    assert kinds.count("MatMulNBits") == products


def test_an_int4_bases_mixed_batch(int4: Path, artifact: Path) -> None:
    """Each row as alone; every adapter changes the tokens of every prompt, and so does int4."""
    generator = load_generator(int4)
    prompts = make_prompts(3, 11, 6)
    adapters = ["second", None, "first"]
    mixed = generator.generate(prompts, adapters=adapters, max_new_tokens=12)
    for row, prompt in enumerate(prompts):
        alone = {
            name: generator.generate([prompt], adapters=[name], max_new_tokens=12)[0].tokens
            for name in (None, *ADAPTERS)
        }
        assert mixed[row].tokens == alone[adapters[row]]
        assert len(set(alone.values())) == 3
    floats = load_generator(artifact).generate(prompts, adapters=adapters, max_new_tokens=12)
    assert [one.tokens for one in floats] != [one.tokens for one in mixed]


def test_an_int4_base_is_built_again_to_verify(int4: Path) -> None:
    report = verify_artifact(int4, Manifest.read(int4), int4.parents[1] / "base")
    assert report.status == "passed"
    assert report.reference.startswith("the base's own graph")


def test_verify_with_and_without_the_base(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere/copy"  # from where the spec's path leads to no base
    shutil.copytree(artifact, copy)
    manifest = Manifest.read(copy)
    report = verify_artifact(copy, manifest, artifact.parents[1] / "base")
    assert (report.status, report.reference) == ("passed", "the float64 model, merged")
    assert set(report.summary().checked) >= set(IMPLEMENTATIONS)
    stored = verify_artifact(copy, manifest)
    assert stored.status == "passed"
    assert stored.reference.startswith("the stored cases (no base here")
    assert stored.skipped == {"peft": "the base is not here"}
    assert set(stored.summary().checked) >= set(IMPLEMENTATIONS[1:])
    with pytest.raises(BaseModelError, match="its weights differ"):
        verify_artifact(copy, manifest, _perturbed(artifact.parents[1] / "base", tmp_path))


def _perturbed(base: Path, folder: Path) -> Path:
    model: Any = tf.AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight += 0.1
    model.save_pretrained(folder / "other")
    write_tokenizer(folder / "other")
    return folder / "other"


@pytest.mark.parametrize("weights", ["float", "int4"])
@pytest.mark.parametrize("fault", ["scaling", "slot", "rows"])
def test_planted_faults_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, weights: str
) -> None:
    pack, assemble = packed_adapters.pack, packed_adapters.assemble

    def turned(*given: Any) -> Any:
        found = pack(*given)
        return {name: np.roll(one, "lora_B" in name, 0) for name, one in found.items()}

    def scaled(layer: Any, weights: Any, scale: float, *rest: Any) -> Any:
        return pack(layer, weights, scale * 1.05, *rest)

    def swapped(stack: Any, dtype: np.dtype, base_rows: Any, blocks: Any) -> np.ndarray:
        return assemble(stack, dtype, base_rows, {1: blocks[2], 2: blocks[1]})

    name, planted = {
        "scaling": ("pack", scaled),
        "slot": ("assemble", swapped),
        "rows": ("pack", turned),
    }[fault]
    monkeypatch.setattr(packed_adapters, name, planted)
    family = Family(FAMILIES["Llama"].config, (["q_proj"], ["q_proj", "v_proj"]))
    base = {"kind": "causal_lm", "path": "base", "weights": weights}
    with pytest.raises(ParityError, match="nothing was published"):
        build(write_decoder(tmp_path, family, base=base), tmp_path / "out")
    assert not (tmp_path / "out/tiny").exists()
    report = json.loads((tmp_path / "out/tiny.failed/parity/parity.json").read_text())
    failed = {
        (row["implementation"], row["adapter"]) for row in report["rows"] if not row["passed"]
    }
    assert {("onnx-cpu", name) for name in ADAPTERS} <= failed
    assert not {one for one in failed if one[0] == "peft" or one[1] == "base"}


def test_a_base_with_a_vocabulary_alone_gets_its_tokenizer(tmp_path: Path) -> None:
    """vocab.json and merges.txt, of a base that generates what it would with tokenizer.json."""
    spec = write_decoder(tmp_path, FAMILIES["Qwen2"])
    base, prompt = tmp_path / "base", "hello world the adapters"
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (base / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    folder, report = build(spec, tmp_path / "artifacts")
    assert report.status == "passed"
    made = Tokenizer.from_file(str(folder / "generator/tokenizer.json"))
    plain: Any = tf.AutoTokenizer.from_pretrained(base)
    assert made.encode(prompt).ids == plain(prompt)["input_ids"]
    chat = [{"role": "user", "content": prompt}]
    written = plain.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    generator = load_generator(folder)
    text = generator.generate([prompt], adapters=["first"], max_new_tokens=4)
    assert text == generator.generate(
        [plain(written)["input_ids"]], adapters=["first"], max_new_tokens=4
    )
