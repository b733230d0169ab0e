"""Whole decoders on onnxruntime-genai: every family of the docs against PEFT's own generate, a
batch with its own adapter for every prompt, planted faults, and what cannot be run."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers as tf
from support.adapters import write_adapter
from support.builds import Project
from support.decoders import (
    ADAPTERS,
    BOS,
    EOS,
    FAMILIES,
    PAD,
    SIZES,
    VOCABULARY,
    Family,
    Peft,
    make_prompts,
    open_driven,
    write_decoder,
    write_tokenizer,
)
from support.torch_free import BLOCKED

import loraexport_runtime as lr
from loraexport.bases import adapters as packed_adapters
from loraexport.bases.genai_folder import adapt_config
from loraexport.cli import app as cli
from loraexport.errors import BaseModelError, ParityError, SpecError, exit_code
from loraexport.pipeline.build import build
from loraexport.pipeline.verify import verify_artifact
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.generator import Completion, TextGenerator
from loraexport_runtime.generation.load import load_generator

ROOT = Path(__file__).resolve().parents[2]
IMPLEMENTATIONS = ("peft", "onnx-cpu", "onnx-genai-cpu")


Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The artifact of a family, built once; `../..` has its base and adapters."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("decoder")
            artifact, report = build(write_decoder(folder, FAMILIES[name]), folder / "out")
            assert report.status == "passed"
            made[name] = artifact
        return made[name]

    return make


@pytest.fixture(scope="module")
def artifact(built: Built) -> Path:
    """Llama's, with a tokenizer. Copy it before you change a file of it."""
    return built("Llama")


@pytest.fixture(scope="module", params=["genai", "driven"])
def generator(artifact: Path, request: pytest.FixtureRequest) -> TextGenerator:
    return load_generator(artifact) if request.param == "genai" else open_driven(artifact)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family(name: str, built: Built) -> None:
    """Parity passes, and a mixed batch gives token for token what PEFT gives for each prompt."""
    artifact = built(name)
    manifest = Manifest.read(artifact)
    assert manifest.parity.status == "passed"
    assert set(manifest.parity.checked) >= set(IMPLEMENTATIONS)  # more with a CUDA device
    report = json.loads((artifact / "parity/parity.json").read_text())
    assert {row["adapter"] for row in report["rows"]} == {"base", *ADAPTERS}
    logits = [row for row in report["rows"] if row["site"] == "logits"]
    assert max(row["error"] for row in logits) < 1e-4
    moved = [row for row in logits if row["adapter"] != "base"]
    assert all(abs(row["gain"] - 1) < 1e-3 and row["moved"] > 0.05 for row in moved)

    prompts = make_prompts(3, 11, 6, 7, 4, 9)
    adapters = ["second", "first", None, "first", "second", None]
    found = load_generator(artifact).generate(prompts, adapters=adapters, max_new_tokens=12)
    driven = open_driven(artifact).generate(prompts, adapters=adapters, max_new_tokens=12)
    assert driven == found
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
    rows = ["| decoder | notes |", "| --- | --- |"]
    rows += [f"| {name} | {family.notes} |" for name, family in FAMILIES.items()]
    assert table == rows, "write this into docs/guides/generation.md:\n" + "\n".join(rows)


def test_the_artifact(artifact: Path) -> None:
    manifest = Manifest.read(artifact)
    assert (manifest.kind, manifest.model) == ("causal_lm", None)
    generator = manifest.generator
    assert generator is not None
    assert (generator.folder, generator.onnx) == ("generator", "generator/model.onnx")
    assert generator.pad_token_id == PAD
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
    model = onnx.load(artifact / generator.onnx, load_external_data=False)
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
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama's with an int4 base."""
    folder = tmp_path_factory.mktemp("int4")
    base = {"kind": "causal_lm", "path": "base", "weights": "int4"}
    artifact, report = build(write_decoder(folder, FAMILIES["Llama"], base=base), folder / "out")
    assert report.status == "passed"
    return artifact


def test_an_int4_base_is_held_to_itself(int4: Path) -> None:
    """Its own graph with float LoRA is the reference, and the report says so."""
    report = json.loads((int4 / "parity/parity.json").read_text())
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


def test_int4_beside_bfloat16_is_refused(tmp_path: Path) -> None:
    base = {"kind": "causal_lm", "path": "base", "weights": "int4"}
    spec = _spec_of_skeleton(tmp_path, base=base, export={"dtype": "bfloat16"})
    with pytest.raises(SpecError, match=r"export.dtype: int4 weights beside bfloat16 \(take float"):
        read_spec(spec)


# What a call takes and refuses


def test_one_prompt_and_no_adapter(generator: TextGenerator) -> None:
    prompt = make_prompts(6)
    assert generator.adapters == {"first": 1, "second": 2}
    alone = generator.generate(prompt, max_new_tokens=6)
    assert alone == generator.generate(prompt, adapters=[None], max_new_tokens=6)
    mixed = generator.generate(prompt * 2, adapters=["second", None], max_new_tokens=6)
    assert mixed[1] == alone[0]
    assert mixed[0].tokens != mixed[1].tokens


def test_max_new_tokens(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(3, 9), ["first", "second"]
    long = generator.generate(prompts, adapters=adapters, max_new_tokens=7)
    short = generator.generate(prompts, adapters=adapters, max_new_tokens=3)
    assert [one.tokens for one in short] == [one.tokens[:3] for one in long]
    assert [(len(one.tokens), one.finish_reason) for one in short] == [(3, "length")] * 2


def test_streaming_gives_the_same_tokens(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(3, 9, 5), ["first", None, "second"]
    texts = [""] * 3
    tokens: list[tuple[int, ...]] = [()] * 3
    order = []
    for piece in generator.stream(prompts, adapters, max_new_tokens=6):
        texts[piece.row] += piece.text
        tokens[piece.row] += (piece.token,)
        order.append(piece.row)
    assert order[:6] == [0, 1, 2, 0, 1, 2]
    found = generator.generate(prompts, adapters=adapters, max_new_tokens=6)
    assert [(one.text, one.tokens) for one in found] == list(zip(texts, tokens, strict=True))


def test_sampling_with_a_seed_repeats(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(3, 9), ["first", "second"]

    def sample(seed: int | None, **options: Any) -> list[tuple[int, ...]]:
        found = generator.generate(
            prompts, adapters=adapters, max_new_tokens=10, temperature=5.0, seed=seed, **options
        )
        return [one.tokens for one in found]

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)
    greedy = generator.generate(prompts, adapters=adapters, max_new_tokens=10)
    assert sample(3, top_k=1) == [one.tokens for one in greedy]
    assert sample(3, top_p=1e-6) == [one.tokens for one in greedy]
    assert sample(3, top_k=0) == sample(3, top_k=0) != sample(4, top_k=0)


def test_a_stop_string_is_cut(generator: TextGenerator) -> None:
    prompts, adapters = make_prompts(5, 9), ["first", None]
    whole = generator.generate(prompts, adapters=adapters, max_new_tokens=16)
    assert all(len(one.text) > 4 for one in whole), whole
    stop = next(text for text in whole[0].text[2:] if text not in whole[1].text)
    cut = generator.generate(prompts, adapters=adapters, max_new_tokens=16, stop=[stop])
    assert cut[0].text == whole[0].text.split(stop)[0]
    assert cut[0].finish_reason == "stop"
    assert len(cut[0].tokens) < 16
    assert cut[1] == whole[1]


def test_the_chat_template(generator: TextGenerator, artifact: Path) -> None:
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(artifact.parents[1] / "base")

    def run(prompt: Any, **options: Any) -> Completion:
        return generator.generate([prompt], adapters=["first"], max_new_tokens=6, **options)[0]

    messages = [{"role": "user", "content": "hello"}]
    written = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert written == "<user>hello<assistant>"
    chat, plain = run(tokenizer(written)["input_ids"]), run(tokenizer("hello")["input_ids"])
    assert chat.tokens != plain.tokens
    assert run("hello") == run(messages) == run(messages, chat=False) == chat
    assert run("hello", chat=False) == plain
    # special tokens are not shown, nor is half a character
    decoded = tokenizer.decode(plain.tokens)
    assert plain.text == decoded[: len(plain.text)]


@pytest.mark.parametrize(
    ("prompts", "options", "error", "message"),
    [
        pytest.param(
            [[5]],
            {"adapters": ["third"]},
            lr.UnknownAdapterError,
            "adapter 'third' is not in this artifact; it has first, second",
            id="unknown-adapter",
        ),
        pytest.param(
            [[5], [6]],
            {"adapters": ["first"]},
            lr.InputError,
            "adapters names 1 rows, but the inputs have 2; give one name, or None for the base",
            id="too-few-adapters",
        ),
        pytest.param(
            [[5]],
            {"adapters": "first"},
            lr.InputError,
            "adapters is 'first'; expected a list with an entry for each of the 1 rows",
            id="adapters-no-list",
        ),
        pytest.param(
            [[5]],
            {"adapters": [{"first": 1.0}]},
            lr.InputError,
            r"adapters\[0\] is a blend; a decoder takes one name per row",
            id="blend",
        ),
        pytest.param([], {}, lr.InputError, "no prompt; give one at least", id="no-prompt"),
        pytest.param(
            "hello",
            {},
            lr.InputError,
            r"prompts is one text; expected a list of prompts",
            id="prompts-no-list",
        ),
        pytest.param([[5], []], {}, lr.InputError, r"prompts\[1\] has no tokens", id="no-tokens"),
        pytest.param(
            [""], {"chat": False}, lr.InputError, r"prompts\[0\] has no tokens", id="empty-text"
        ),
        pytest.param(
            [[5, PAD, 6]],
            {},
            lr.InputError,
            r"prompts\[0\]: tokens range from 0 to 6; expected 0 to 319 without 0, which stands",
            id="padding",
        ),
        pytest.param(
            [[5, VOCABULARY]],
            {},
            lr.InputError,
            r"prompts\[0\]: tokens range from 5 to 320; expected 0 to 319",
            id="vocabulary",
        ),
        pytest.param(
            [[5], [5] * 120],
            {"max_new_tokens": 9},
            lr.InputError,
            "a prompt of 120 tokens and 9 new ones are more than the model's 128; shorten",
            id="too-long",
        ),
        pytest.param(
            [[5]],
            {"max_new_tokens": 0},
            lr.InputError,
            "max_new_tokens is 0; expected 1 or more",
            id="no-new-tokens",
        ),
        pytest.param(
            [[5]],
            {"stop": "x"},
            lr.InputError,
            "stop is 'x'; expected a list of texts, none of them empty",
            id="stop-no-list",
        ),
        pytest.param(
            [[5]],
            {"top_k": -1},
            lr.InputError,
            "top_k is -1 and top_p 1.0; expected a top_k of 0",
            id="top-k",
        ),
        pytest.param(
            [[5]],
            {"top_p": 0.0},
            lr.InputError,
            "top_k is 50 and top_p 0.0; expected .* a top_p above 0, up to 1",
            id="top-p",
        ),
        pytest.param(
            [[5]],
            {"stop": [""]},
            lr.InputError,
            r"stop is \[''\]; expected a list of texts, none of them empty",
            id="stop-empty",
        ),
    ],
)
def test_a_batch_that_cannot_be_run(
    generator: TextGenerator, prompts: Any, options: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        generator.generate(prompts, **options)
    assert isinstance(caught.value, lr.BatchError)
    assert exit_code(caught.value) == 2
    with pytest.raises(error, match=message):
        next(generator.stream(prompts, **options))
    good = generator.generate([[5]], adapters=["first"], max_new_tokens=2)
    assert len(good[0].tokens) == 2


def test_the_longest_prompt(generator: TextGenerator) -> None:
    found = generator.generate([[5] * 120, [7]], adapters=["first", None], max_new_tokens=8)
    assert [len(one.tokens) for one in found] == [8, 8]


# Opening


def test_a_provider_that_cannot_run(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime_genai

    monkeypatch.setattr(onnxruntime_genai, "is_cuda_available", lambda: False)
    with pytest.raises(lr.ProviderError, match="CUDA was asked for, but this onnxruntime-genai"):
        load_generator(artifact, "cuda")
    with pytest.raises(lr.ProviderError, match="expected 'cpu' or 'cuda', got 'npu'"):
        load_generator(artifact, "npu")
    with pytest.raises(lr.ProviderError, match="CUDA graphs were asked for on 'cpu'; pass prov"):
        load_generator(artifact, cuda_graphs=True)
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(lr.ProviderError, match=r"pip install 'loraexport-runtime\[genai\]'"):
        load_generator(artifact)


def test_cuda_where_there_is_no_device(artifact: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(lr.ProviderError, match=r"CUDA was asked for|cannot open it on cuda"):
        load_generator(artifact, "cuda")
    with pytest.raises(lr.ProviderError, match=r"CUDAExecutionProvider was asked for but cannot"):
        load_generator(artifact, "cuda", cuda_graphs=True)


def test_each_kind_has_its_own_loader(artifact: Path, tenants: Path) -> None:
    with pytest.raises(
        lr.ArtifactError, match=r"its kind is 'causal_lm'; open it with .*load_generator\(\)"
    ):
        lr.load(artifact)
    with pytest.raises(lr.ArtifactError, match=r"its kind is 'layers'; open it with load\(\)"):
        load_generator(tenants)


def test_a_damaged_or_unproven_artifact(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    graph = copy / "generator/model.onnx.data"
    data = bytearray(graph.read_bytes())
    data[100] ^= 1
    graph.write_bytes(data)
    with pytest.raises(lr.ArtifactError, match=r"model.onnx.data: its sha256 differs"):
        load_generator(copy)
    (copy / "generator/genai_config.json").unlink()
    with pytest.raises(lr.ArtifactError, match=r"genai_config.json: listed in .* but missing"):
        load_generator(copy)

    unproven = tmp_path / "unproven"
    shutil.copytree(artifact, unproven)
    manifest = json.loads((unproven / "manifest.json").read_text())
    manifest["parity"]["status"] = "deferred"
    (unproven / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(lr.ArtifactError, match="parity is 'deferred', so its numbers are not pro"):
        load_generator(unproven)
    opened = load_generator(unproven, allow_unverified=True)
    assert len(opened.generate([[5]], max_new_tokens=2)[0].tokens) == 2


SERVICE = f"""
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Block())
from loraexport_runtime.generation.generator import load_generator

generator = load_generator(sys.argv[1])
found = generator.generate(
    ["hello", "the world", "a"], adapters=["first", None, "second"], max_new_tokens=5
)
print([one.tokens for one in found])
assert not set(sys.modules) & set({BLOCKED})
"""


def test_a_service_without_torch(artifact: Path, generator: TextGenerator) -> None:
    command = [sys.executable, "-W", "error", "-c", SERVICE, str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    prompts, adapters = ["hello", "the world", "a"], ["first", None, "second"]
    found = generator.generate(prompts, adapters=adapters, max_new_tokens=5)
    assert done.stdout.strip() == str([one.tokens for one in found])


# The proof


def test_verify_with_and_without_the_base(artifact: Path, built: Built, tmp_path: Path) -> None:
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
    cut = packed_adapters._cut

    def turned(packed: Any, *rest: Any) -> Any:
        found = cut(packed, *rest)
        return {name: np.roll(one, "lora_B" in name, 0) for name, one in found.items()}

    def scaled(layer: Any, weights: Any, scale: float, *rest: Any) -> Any:
        return pack(layer, weights, scale * 1.05, *rest)

    def swapped(stack: Any, dtype: np.dtype, base_rows: Any, blocks: Any) -> np.ndarray:
        return assemble(stack, dtype, base_rows, {1: blocks[2], 2: blocks[1]})

    name, planted = {
        "scaling": ("pack", scaled),
        "slot": ("assemble", swapped),
        "rows": ("_cut", turned),
    }[fault]
    monkeypatch.setattr(packed_adapters, name, planted)
    same = {"max_rank": 8} if fault == "slot" else {}
    family = Family(FAMILIES["Llama"].config, (["q_proj"], ["q_proj", "v_proj"]))
    base = {"kind": "causal_lm", "path": "base", "weights": weights}
    with pytest.raises(ParityError, match="nothing was published"):
        build(write_decoder(tmp_path, family, base=base, **same), tmp_path / "out")
    assert not (tmp_path / "out/tiny").exists()
    report = json.loads((tmp_path / "out/tiny.failed/parity/parity.json").read_text())
    failed = {
        (row["implementation"], row["adapter"]) for row in report["rows"] if not row["passed"]
    }
    assert {("onnx-cpu", name) for name in ADAPTERS} <= failed
    assert not {one for one in failed if one[0] == "peft" or one[1] == "base"}


# The plan


def _spec_of_skeleton(folder: Path, **changes: Any) -> Path:
    """A base without weights and one adapter: what a plan reads."""
    FAMILIES["Llama"].config().save_pretrained(folder / "base")
    write_adapter(folder / "sql", {"model.layers.0.self_attn.q_proj": (64, 64)})
    data = {
        "base": {"kind": "causal_lm", "path": "base"},
        "adapters": [{"name": "sql", "path": "sql"}],
    }
    return Project(folder).spec(**(data | changes))


def test_the_plan_of_one_site_has_all_that_share_its_input(tmp_path: Path) -> None:
    spec = _spec_of_skeleton(tmp_path)
    plan = make_plan(read_spec(spec), tmp_path)
    assert plan.model is None
    assert plan.generator is not None
    assert [[part.site for part in one.layer.slices] for one in plan.layers] == [
        [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    ]
    (why,) = {one.strategy_reason for one in plan.layers}
    assert why.startswith("least by the costs of one NVIDIA H200 for 32 tokens and 1 slots")


@pytest.mark.parametrize(
    ("export", "strategy", "why"),
    [
        ({"strategy": "chunked"}, "masked", "it joins a graph that exists, which chunked cannot"),
        ({"strategy": "augmented"}, "augmented", "the spec asks for it"),
        ({"tune": {"device": "cpu"}}, "masked", "on a CPU masked costs least"),
        ({"tune": {"tokens": 65536}}, "augmented", "for 65536 tokens and 1 slots"),
    ],
)
def test_the_strategy(tmp_path: Path, export: dict[str, Any], strategy: str, why: str) -> None:
    spec = _spec_of_skeleton(tmp_path, export=export)
    (layer,) = make_plan(read_spec(spec), tmp_path).layers
    assert layer.layer.strategy == strategy
    assert why in layer.strategy_reason


def test_sites_all_linear(tmp_path: Path) -> None:
    spec = _spec_of_skeleton(tmp_path, sites="all-linear", slots=3, max_rank=8)
    plan = make_plan(read_spec(spec), tmp_path)
    names = [[part.name for part in one.layer.slices] for one in plan.layers]
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names == block * 2
    assert {one.layer.max_rank for one in plan.layers} == {8}
    for stack in [stack for one in plan.layers for stack in one.layer.stacks]:
        assert (stack.shape[0] - stack.row_offset) % (3 * 8) == 0


@pytest.mark.parametrize("room", [{}, {"slots": 2}, {"max_rank": 16}, {"sites": ["q_proj"]}])
def test_an_adapter_takes_rows_of_its_own_rank(tmp_path: Path, room: dict[str, Any]) -> None:
    """Unless the spec asks for room for later ones."""
    layer = "model.layers.0.self_attn"
    sites = {f"{layer}.q_proj": (64, 64)}
    write_adapter(tmp_path / "low", sites, rank=3)
    write_adapter(tmp_path / "high", sites | {f"{layer}.v_proj": (64, 32)}, rank=12)
    adapters = [{"name": name, "path": name} for name in ("low", "high")]
    spec = _spec_of_skeleton(tmp_path, adapters=adapters, **room)
    a, *bs = make_plan(read_spec(spec), tmp_path).layers[0].layer.stacks
    whole = 3 * room.get("max_rank", 12)
    if not room:
        assert (a.slot_rows, a.rows(1), a.rows(2)) == ((8, 24), slice(0, 8), slice(8, 32))
        assert {stack.slot_rows for stack in bs} == {(8, 24)}
        assert {stack.shape[0] - stack.row_offset for stack in (a, *bs)} == {32}
    else:
        assert (a.slot_rows, a.rows(2)) == (None, slice(whole, 2 * whole))


def test_dora_is_refused_by_name(tmp_path: Path) -> None:
    spec = _spec_of_skeleton(tmp_path)
    site = "model.layers.0.self_attn.q_proj"
    magnitude = f"base_model.model.{site}.lora_magnitude_vector"
    write_adapter(
        tmp_path / "sql",
        {site: (64, 64)},
        config={"use_dora": True},
        tensors={magnitude: np.ones(64, np.float32)},
    )
    with pytest.raises(
        lr.AdapterConfigError,
        match=r"sql: it uses dora .*a decoder that generates \(base.kind: causal_lm\) has no place",
    ):
        make_plan(read_spec(spec), tmp_path)


def test_keys_that_a_decoder_has_no_place_for(tmp_path: Path) -> None:
    spec = _spec_of_skeleton(tmp_path, features=["dora"], export={"blend": True})
    with pytest.raises(SpecError) as caught:
        read_spec(spec)
    lines = {one.path: (one.message, one.hint) for one in caught.value.problems}
    hint = "remove it, or take the whole model as base.kind: transformers"
    assert lines == dict.fromkeys(("features", "export.blend"), ("for whole models only", hint))


def test_a_wrong_base_in_a_spec(tmp_path: Path) -> None:
    spec = _spec_of_skeleton(tmp_path, base={"kind": "causal_lm", "paht": "base"})
    with pytest.raises(SpecError) as caught:
        read_spec(spec)
    found = {(one.line, one.path, one.message, one.hint) for one in caught.value.problems}
    assert found == {
        (3, "base.path", "required key is missing", "add it"),
        (5, "base.paht", "unknown key", "did you mean 'path'?"),
    }


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        pytest.param(
            Family(
                lambda: tf.GPT2Config(
                    vocab_size=VOCABULARY,
                    n_embd=32,
                    n_layer=1,
                    n_head=2,
                    bos_token_id=BOS,
                    eos_token_id=EOS,
                ),
                (["c_attn"], ["c_attn"]),
            ),
            "NotImplementedError",
            id="GPT-2",
        ),
        # onnxruntime-genai 0.18 asks for position_ids in a layer without RoPE, as SmolLM3 has.
        pytest.param(
            Family(lambda: tf.SmolLM3Config(**SIZES, no_rope_layers=[1, 0])),
            "KeyError: 'position_ids'",
            id="SmolLM3-without-RoPE",
        ),
    ],
)
def test_a_model_that_the_builder_cannot_take(tmp_path: Path, family: Family, reason: str) -> None:
    with pytest.raises(
        BaseModelError,
        match=f"base: onnxruntime-genai's model builder cannot take this model: {reason}",
    ):
        build(write_decoder(tmp_path, family), tmp_path / "out")
    assert not (tmp_path / "out/tiny").exists()


# The command line


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`loraexport generate` in this process."""

    def run_command(*arguments: object) -> Done:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["loraexport", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        captured = capsys.readouterr()
        return Done(int(caught.value.code or 0), captured.out, captured.err)

    return run_command


def test_generate_on_the_command_line(run: Run, artifact: Path, generator: TextGenerator) -> None:
    arguments = ["--prompt", "hello", "--prompt", "[a] :b:", "--max-new-tokens", 5]
    arguments += ["--adapter", "first", "--adapter", "base"]
    expected = generator.generate(["hello", "[a] :b:"], adapters=["first", None], max_new_tokens=5)
    done = run(artifact, *arguments)
    assert (done.code, done.err) == (0, "")
    lines = ["[first] hello", expected[0].text, "[base] [a] :b:", expected[1].text]
    assert done.out.split() == "\n".join(lines).split()
    done = run(artifact, *arguments, "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == [
        {
            "prompt": prompt,
            "adapter": name,
            "text": one.text,
            "tokens": list(one.tokens),
            "finish_reason": one.finish_reason,
        }
        for prompt, name, one in zip(["hello", "[a] :b:"], ["first", None], expected, strict=True)
    ]
    alone = json.loads(run(artifact, "--prompt", "hello", "--json").out)
    assert (alone[0]["adapter"], len(alone)) == (None, 1)


def test_faults_on_the_command_line(run: Run, artifact: Path, tenants: Path) -> None:
    done = run(artifact, "--prompt", "hello", "--adapter", "third")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("UnknownAdapterError: adapter 'third' is not in this artifact")
    done = run(artifact, "--prompt", "a", "--prompt", "b", "--adapter", "first")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("InputError: adapters names 1 rows, but the inputs have 2")
    done = run(tenants, "--prompt", "a")
    assert (done.code, done.out) == (5, "")
    assert "its kind is 'layers'" in done.err


def test_the_schema_knows_decoders() -> None:
    schema = json.loads((ROOT / "specs/spec.schema.json").read_text())
    assert "CausalLmSpec" in schema["$defs"]


def test_a_padding_token_for_a_base_without_its_own(tmp_path: Path) -> None:
    """Not the token that ends a text, and none that a chat template writes."""
    write_tokenizer(tmp_path)
    config = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": BOS, "decoder": {}}

    def choose(pad: int | None) -> int:
        file = tmp_path / "genai_config.json"
        file.write_text(json.dumps({"model": config | {"pad_token_id": pad}}))
        found = adapt_config(tmp_path)
        assert json.loads(file.read_text())["model"]["pad_token_id"] == found
        return found

    assert choose(7) == 7
    for pad in (None, EOS):
        assert choose(pad) == PAD  # the tokenizer's
    tokenizer: Any = tf.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<spare>"]})
    tokenizer.save_pretrained(tmp_path)
    assert choose(EOS) == tokenizer.convert_tokens_to_ids("<spare>")


def test_a_base_without_a_tokenizer_is_refused(built: Built, tmp_path: Path) -> None:
    spec = write_decoder(tmp_path, FAMILIES["Llama"])
    (tmp_path / "base/tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match=r"no tokenizer.json, which onnxruntime-genai needs"):
        build(spec, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts/decoder").exists()
