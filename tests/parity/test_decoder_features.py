"""What adapters of a decoder bring beside A and B of linear layers: proven by the build, beside
others in one batch, and loaded into a generator that runs; token for token as PEFT has it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file
from support.builds import Project
from support.decoder_features import Alone, write_adapter, write_features
from support.decoders import ADAPTERS, EOS, make_prompts, write_family, write_genai
from support.home import Home
from support.waiting import DEADLINE

import loraexport_runtime as lr
from loraexport.errors import BaseModelError
from loraexport.parity.decoder.reference import Text
from loraexport.parity.decoder.sources import PlainDecoder
from loraexport.parity.oracle import read_adapters, read_reference_adapter
from loraexport.pipeline.build import build
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.handle import Generation

# PEFT says of lora_bias that its tensors are shards, wrongly.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning"),
]
STEPS = 12
LATER = ["dora", "lora_bias", "lora_only", "all_three"]
MODULES = ["plain", *LATER]


def _assert_as_peft(
    generator: lr.TextGenerator, folder: Path, names: list[str | None], **options: Any
) -> None:
    """A batch of all, some of them twice, in an order of its own."""
    rows = [*names, names[0]]
    prompts = make_prompts(*(3 + 4 * (index % 3) for index in range(len(rows))))
    found = generator.generate(prompts, rows, max_new_tokens=STEPS, temperature=0.0)
    plain = Alone(folder, None)
    alone = {name: Alone(folder, name, **options) if name else plain for name in names}
    for row, (name, prompt) in enumerate(zip(rows, prompts, strict=True)):
        assert found[row].tokens == alone[name].generate(prompt, STEPS), f"row {row}: {name}"
        assert name is None or found[row].tokens != plain.generate(prompt, STEPS)


def _report(artifact: Path) -> list[dict[str, Any]]:
    rows = json.loads((artifact / "parity/parity.json").read_text())["rows"]
    assert isinstance(rows, list)
    return rows


@pytest.fixture(scope="module")
def modules(home: Home) -> Path:
    """Biases of q, k and v in the base, and none of o and the MLP."""
    return home.artifact(write_features, "Qwen2", MODULES)


def test_dora_and_biases_are_proven(modules: Path) -> None:
    rows = _report(modules)
    assert {row["implementation"] for row in rows} >= {"peft", "onnx-cpu", "onnx-engine-cpu"}
    for name in MODULES:
        own = [row for row in rows if row["adapter"] == name]
        assert max(row["error"] for row in own) < 1e-4
        moved = [row["moved"] for row in own if row["site"] == "logits"]
        assert min(moved) > 0.05
    roles = {stack.role for layer in Manifest.read(modules).layers for stack in layer.stacks}
    assert roles == {"lora_A", "lora_B", "output_scale", "bias"}


def test_a_batch_of_dora_and_biases(modules: Path) -> None:
    with lr.load_generator(modules) as generator:
        _assert_as_peft(generator, modules.parents[1], [*MODULES, None])


def test_dora_and_biases_come_and_go(home: Home) -> None:
    """Into two slots of a generator that was built with neither, with a scale, and out again."""
    artifact = home.artifact(
        write_features,
        "Qwen2",
        ["plain"],
        LATER,
        slots=2,
        max_rank=4,
        sites="all-linear",
        features=["dora", "bias"],
    )
    folder = artifact.parents[1]
    with lr.load_generator(artifact) as generator:
        with pytest.raises(lr.AdapterError, match=r"uses DoRA.* pass base="):
            generator.load_adapter("dora", folder / "dora")
        for name in LATER:
            scale = 0.5 if name in ("dora", "lora_bias") else 1.0
            generator.load_adapter(name, folder / name, scale=scale, base=folder / "base")
            _assert_as_peft(generator, folder, [name, None], scale=scale)
            _assert_as_peft(generator, folder, ["plain"])
        generator.unload_adapter("all_three")
        _assert_as_peft(generator, folder, ["lora_only", "plain", None])  # paged in again


def test_an_artifact_without_room_for_features_says_so(home: Home, tmp_path: Path) -> None:
    artifact = home.artifact(write_family, "Llama")
    with lr.load_generator(artifact) as generator:
        for name, why in (("dora", "uses DoRA"), ("lora_bias", "brings a bias")):
            write_adapter(artifact.parents[1], name, tmp_path / name)
            feature = "dora" if name == "dora" else "bias"
            match = f"{why}, for which this artifact has no place; add {feature} to features"
            with pytest.raises(lr.AdapterWeightsError, match=match):
                generator.load_adapter(name, tmp_path / name)


@pytest.mark.parametrize("family", ["Qwen2", pytest.param("Gemma", marks=pytest.mark.slow)])
def test_features_over_int4(family: str, home: Home) -> None:
    """Scaled by the lengths of the weights that the adapter was trained on. Gemma's table is the
    output layer's int4."""
    base = {"kind": "causal_lm", "path": "base", "weights": "int4"}
    names = ["lora_bias", "all_three", "embedding", "dora_ends"]
    artifact = home.artifact(write_features, family, names, base=base)
    rows = _report(artifact)
    assert max(row["error"] for row in rows) < 1e-3
    gains = [row["gain"] for row in rows if row["gain"] is not None]
    assert max(abs(gain - 1) for gain in gains) < 1e-2


@pytest.fixture(scope="module")
def blends(home: Home) -> Path:
    names = ["dora", "plain", "lora_only"]
    return home.artifact(write_features, "Qwen2", names, ["lora_bias"], export={"blend": True})


BLENDS: list[tuple[str | None, Any]] = [
    ("half", {"plain": 0.5}),
    ("two", {"dora": 0.75, "lora_only": 1.5}),
    ("all", {"dora": -0.5, "plain": 1.0, "lora_only": 0.25}),
    ("one", "dora"),
    ("base", None),
]


def test_blends_are_proven(blends: Path) -> None:
    """Each row the base and the sum of its adapters' changes at every site, as in whole models."""
    rows = [row for row in _report(blends) if row["adapter"] == "blend"]
    assert {(row["implementation"], row["site"]) for row in rows} >= {
        ("onnx-cpu", "logits"),
        ("onnx-cpu", "rows alone"),
        ("onnx-engine-cpu", "tokens"),
    }
    assert max(row["error"] for row in rows) < 1e-4
    assert lr.load_generator(blends).manifest.kind.blend  # type: ignore[union-attr]


def test_blends_in_one_batch(blends: Path) -> None:
    """Beside rows of one adapter and of none, as the float64 model with the blend merged."""
    names = ["dora", "plain", "lora_only"]
    reference = PlainDecoder(
        blends.parents[1] / "base", read_adapters(blends, Manifest.read(blends)), None
    )
    prompts = make_prompts(*range(4, 4 + len(BLENDS)))
    with lr.load_generator(blends) as generator:
        found = generator.generate(
            prompts, [row for _, row in BLENDS], max_new_tokens=8, temperature=0.0
        )
        texts = []
        for (_, row), prompt in zip(BLENDS, prompts, strict=True):
            shares = {row: 1.0} if isinstance(row, str) else row or {}
            mix = tuple((names.index(name) + 1, weight) for name, weight in shares.items())
            texts.append(Text(mix, tuple(prompt)))
        wanted = reference.greedy(texts)
        for (label, _), one, (tokens, _logits) in zip(BLENDS, found, wanted, strict=True):
            expected = tokens.tolist()
            end = expected.index(EOS) if EOS in expected else len(expected)
            assert list(one.tokens) == expected[:end], label


def test_blends_of_requests(blends: Path) -> None:
    """Of adapters that come and go; a text goes on from another one's under the same blend alone,
    by content; and what cannot be blended is refused."""
    prompt = make_prompts(24)[0]
    with lr.load_generator(blends) as generator:
        engine = generator.engine

        def send(adapter: Any) -> Generation:
            request = lr.GenerationRequest(tokens=prompt, adapter=adapter, max_tokens=6)
            return engine.submit(request).result(DEADLINE)

        def tokens(adapter: Any) -> list[int]:
            return [one.token for one in send(adapter).answers[0].tokens]

        folder = blends.parents[1]
        first = tokens({"plain": 0.5, "dora": 1.0})
        again = send({"dora": 1, "plain": np.float32(0.5)})
        assert again.reused_tokens > 16
        assert [one.token for one in again.answers[0].tokens] == first
        assert send({"dora": 1.0, "plain": 0.25}).reused_tokens == 0
        assert tokens({"plain": 1.0}) == tokens("plain")
        assert tokens({"plain": 0.0}) == tokens({}) == tokens(None) != first
        half = Alone(folder, "plain", scale=0.5).generate(prompt, 6)
        assert tuple(tokens({"plain": 0.5})) == half != tuple(tokens("plain"))
        generator.load_adapter("other", folder / "plain")  # in place of another one's slot
        assert tokens({"other": 0.5, "dora": 1.0}) == first
        with pytest.raises(lr.UnknownAdapterError, match="adapter 'x' is not loaded"):
            send({"dora": 1.0, "x": 1.0})
        with pytest.raises(lr.SlotsExceededError, match="names 4 adapters, but there are 3 slots"):
            send({"dora": 1.0, "plain": 1.0, "lora_only": 1.0, "other": 1.0})
        for adapter, text in (
            ({"dora": float("nan")}, "adapter: weight nan of adapter 'dora'; expected a finite"),
            ({"dora": "1"}, "adapter: weight '1' of adapter 'dora'; expected a finite number"),
            (["dora"], r"adapter is \['dora'\]; expected a name, weights by name, or None"),
        ):
            with pytest.raises(lr.InputError, match=text):
                send(adapter)


def test_blends_in_a_graph_that_exists(tmp_path: Path) -> None:
    """A folder of onnxruntime-genai; its base's part is the graph's own."""
    write_genai(tmp_path)
    adapters = [{"name": name, "path": name} for name in ADAPTERS]
    base, export = {"kind": "onnx", "path": "genai"}, {"blend": True}
    artifact, report = build(
        Project(tmp_path).spec(base=base, adapters=adapters, export=export), tmp_path / "out"
    )
    rows = [row for row in report.rows if row.adapter == "blend"]
    assert {row.implementation for row in rows} >= {"onnx-cpu", "onnx-engine-cpu"}
    assert max(row.error for row in rows) < 1e-4
    with lr.load_generator(artifact) as generator:
        prompt = make_prompts(9)
        found = generator.generate(prompt, [{"first": 0.5}], max_new_tokens=8)[0]
        assert found.tokens == Alone(tmp_path, "first", scale=0.5).generate(prompt[0], 8)


# The layers of the vocabulary

ENDS = ["embedding", "saved_head", "saved_table", "saved_both", "dora_ends", "biased_head", "plain"]


@pytest.mark.parametrize("family", ["Qwen2", pytest.param("Gemma", marks=pytest.mark.slow)])
def test_layers_of_the_vocabulary(family: str, home: Home) -> None:
    """LoRA on the table, and tables and output layers of an adapter's own; Gemma's are one tensor,
    and its table has a factor."""
    artifact = home.artifact(write_features, family, ENDS)
    step = onnx.load(artifact / "generator/step.onnx", load_external_data=False)
    (flat,) = [node for node in step.graph.node if node.name == "loraexport/flat"]
    assert "norm" in flat.input[0], "the output layers compute every token of a prompt"
    rows = _report(artifact)
    assert {row["implementation"] for row in rows} >= {"peft", "onnx-cpu", "onnx-engine-cpu"}
    assert max(row["error"] for row in rows) < 1e-4
    with lr.load_generator(artifact) as generator:
        _assert_as_peft(generator, artifact.parents[1], [*ENDS, None])


def test_layers_of_the_vocabulary_come_and_go_and_blend(home: Home) -> None:
    later = ["saved_both", "saved_table", "dora_ends", "biased_head"]
    artifact = home.artifact(
        write_features,
        "Qwen2",
        ["plain", "embedding"],
        later,
        max_rank=4,
        slots=2,
        sites=["q_proj", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head"],
        features=["heads", "dora", "bias"],
        export={"blend": True},
    )
    folder = artifact.parents[1]
    with lr.load_generator(artifact) as generator:
        for name in later:
            generator.load_adapter(name, folder / name, base=folder / "base")
            _assert_as_peft(generator, folder, [name, None])
        _assert_as_peft(generator, folder, ["embedding", "saved_both"])
        prompt = make_prompts(5)
        # A blend of tables and output layers: half of the way from the base's to the adapter's.
        half = generator.generate(prompt, [{"saved_both": 0.5}], max_new_tokens=8, temperature=0.0)
        sites = [part.site for layer in generator.manifest.layers for part in layer.slices]
        adapters = {1: read_reference_adapter(folder / "saved_both", sites)}
        wanted = PlainDecoder(folder / "base", adapters, None)
        ((tokens, _),) = wanted.greedy([Text(((1, 0.5),), tuple(prompt[0]))])
        assert list(half[0].tokens) == [token for token in tokens.tolist() if token != EOS]


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        (
            "saved_product",
            {},
            lr.AdapterWeightsError,
            r"it brings 'model\.layers\.0\.self_attn\.q_proj', trained whole .*; of a decoder only"
            r" model\.embed_tokens and lm_head can differ by row",
        ),
        (
            "saved_head",
            {"base": {"kind": "causal_lm", "path": "base", "weights": "int4"}},
            BaseModelError,
            "with weights: int4 the base's are no floats that could stand beside them; build it",
        ),
    ],
)
def test_whole_layers_that_have_no_place(
    name: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    spec = write_features(tmp_path, "Qwen2", [name], **changes)
    with pytest.raises(error, match=message):
        make_plan(read_spec(spec), tmp_path)


def test_a_table_of_another_size_is_refused(home: Home, tmp_path: Path) -> None:
    """Where the artifact has a place for one, and where it has none."""
    artifact = home.artifact(write_features, "Qwen2", ENDS)
    shutil.copytree(artifact.parents[1] / "saved_table", tmp_path / "saved_table")
    file = tmp_path / "saved_table/adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if "embed_tokens" in name]
    save_file(tensors | {name: tensors[name][:-1]}, file, {"format": "pt"})
    with lr.load_generator(artifact) as generator:
        match = "has 319 rows of 64, but site 'model.embed_tokens' has 320 of 64; .* resized"
        with pytest.raises(lr.AdapterWeightsError, match=match):
            generator.load_adapter("other", tmp_path / "saved_table")
