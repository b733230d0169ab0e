"""Plans of decoders, and the bases and keys that a plan or a build refuses."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as tf
from support.adapters import write_adapter
from support.builds import Project
from support.decoders import (
    BOS,
    EOS,
    FAMILIES,
    VOCABULARY,
    Family,
    write_decoder,
    write_tokenizer,
)

from loraexport.bases.decoder import load_decoder_graph
from loraexport.errors import BaseModelError, SpecError
from loraexport.pipeline.build import build
from loraexport.plan.decoder import DecoderPlan
from loraexport.plan.plan import make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.generation.generator import TextGenerator
from loraexport_runtime.generation.load import load_generator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def generator(artifact: Path) -> TextGenerator:
    return load_generator(artifact)


def test_int4_beside_bfloat16_is_refused(tmp_path: Path) -> None:
    base = {"kind": "causal_lm", "path": "base", "weights": "int4"}
    spec = _spec_of_skeleton(tmp_path, base=base, export={"dtype": "bfloat16"})
    with pytest.raises(SpecError, match=r"export.dtype: int4 weights beside bfloat16 \(take float"):
        read_spec(spec)


def _spec_of_skeleton(folder: Path, **changes: Any) -> Path:
    """A base and one adapter."""
    tf.AutoModelForCausalLM.from_config(FAMILIES["Llama"].config()).save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    write_adapter(folder / "sql", {"model.layers.0.self_attn.q_proj": (64, 64)})
    data = {
        "base": {"kind": "causal_lm", "path": "base"},
        "adapters": [{"name": "sql", "path": "sql"}],
    }
    return Project(folder).spec(**(data | changes))


def test_a_base_without_weights_or_with_a_broken_tokenizer(tmp_path: Path) -> None:
    spec = read_spec(_spec_of_skeleton(tmp_path))
    (tmp_path / "base/tokenizer.json").write_text("{")
    with pytest.raises(BaseModelError, match=r"tokenizer\.json: not JSON"):
        make_plan(spec, tmp_path)
    (tmp_path / "base/model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no safetensors file here"):
        make_plan(spec, tmp_path)


def test_phi3_as_it_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code lies beside it, which is neither run nor asked for; the artifact's files name none."""
    spec = write_decoder(tmp_path, FAMILIES["Phi-3"])
    base, ran = tmp_path / "base", tmp_path / "ran"
    names = ("configuration_phi3.Phi3Config", "modeling_phi3.Phi3ForCausalLM")
    for name in names:
        module, _, kind = name.partition(".")
        code = f"open({str(ran)!r}, 'w').close()\nclass {kind}:\n    pass\n"
        (base / f"{module}.py").write_text(code)
    for file, auto_map in (
        ("config.json", dict(zip(("AutoConfig", "AutoModelForCausalLM"), names, strict=True))),
        ("tokenizer_config.json", {"AutoTokenizer": [names[0], None]}),
    ):
        values = json.loads((base / file).read_text()) | {"auto_map": auto_map}
        (base / file).write_text(json.dumps(values))
    monkeypatch.setattr(sys, "stdin", None)
    plan: Any = make_plan(read_spec(spec), tmp_path)
    graph = load_decoder_graph(plan)
    graph.write_files(tmp_path / "files")
    assert "auto_map" not in (tmp_path / "files/tokenizer_config.json").read_text()
    assert not ran.exists()


def test_the_plan_of_one_site_has_all_that_share_its_input(tmp_path: Path) -> None:
    spec = _spec_of_skeleton(tmp_path)
    plan = make_plan(read_spec(spec), tmp_path)
    assert isinstance(plan.kind, DecoderPlan)
    assert (plan.kind.directory, plan.kind.graph) == (tmp_path / "base", None)
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


@pytest.mark.parametrize("room", [{}, {"slots": 3}, {"max_rank": 16}, {"sites": ["q_proj"]}])
def test_every_slot_has_room_for_any_adapter(tmp_path: Path, room: dict[str, Any]) -> None:
    """Of the largest rank, at every site, whatever the adapters of the spec bring."""
    layer = "model.layers.0.self_attn"
    sites = {f"{layer}.q_proj": (64, 64)}
    write_adapter(tmp_path / "low", sites, rank=3)
    write_adapter(tmp_path / "high", sites | {f"{layer}.v_proj": (64, 32)}, rank=12)
    adapters = [{"name": name, "path": name} for name in ("low", "high")]
    spec = _spec_of_skeleton(tmp_path, adapters=adapters, **room)
    a, *bs = make_plan(read_spec(spec), tmp_path).layers[0].layer.stacks
    whole = 3 * room.get("max_rank", 12)
    assert (a.slot_rows, a.rows(2)) == (None, slice(whole, 2 * whole))
    rows = room.get("slots", 2) * whole
    assert {stack.shape[0] - stack.row_offset for stack in (a, *bs)} == {rows}


@pytest.mark.parametrize("features", [None, ["bias"]])
def test_dora_gives_every_site_a_scale(tmp_path: Path, features: list[str] | None) -> None:
    """And features that come later a place, at every site too; W then stays out of the stacks."""
    spec = _spec_of_skeleton(tmp_path, sites=["q_proj", "o_proj"], features=features)
    site = "model.layers.0.self_attn.q_proj"
    magnitude = f"base_model.model.{site}.lora_magnitude_vector"
    write_adapter(
        tmp_path / "sql",
        {site: (64, 64)},
        config={"use_dora": True},
        tensors={magnitude: np.ones(64, np.float32)},
    )
    roles = ["lora_A", "lora_B", "output_scale", *(features or [])]
    plan = make_plan(read_spec(spec), tmp_path)
    assert len(plan.layers) == 4
    for one in plan.layers:
        assert [stack.role for stack in one.layer.stacks] == roles
        assert (one.layer.strategy, one.layer.base_rows) == ("masked", None)
        assert one.strategy_reason == "a slot's own base parameters leave no [W ; B] product"
        own = one.layer.stacks[2:]
        assert [(stack.shape, stack.row_offset) for stack in own] == [
            ((2, one.layer.out_features), 1)
        ] * len(own)


def test_keys_that_a_decoder_has_no_place_for(tmp_path: Path) -> None:
    spec = _spec_of_skeleton(tmp_path, export={"packed": True})
    with pytest.raises(SpecError) as caught:
        read_spec(spec)
    lines = {one.path: (one.message, one.hint) for one in caught.value.problems}
    hint = "remove it, or take the whole model as base.kind: transformers"
    assert lines == dict.fromkeys(("export.packed",), ("for whole models only", hint))


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
    ],
)
def test_a_model_that_the_builder_cannot_take(tmp_path: Path, family: Family, reason: str) -> None:
    with pytest.raises(
        BaseModelError,
        match=f"base: onnxruntime-genai's model builder cannot take this model: {reason}",
    ):
        build(write_decoder(tmp_path, family), tmp_path / "out")
    assert not (tmp_path / "out/tiny").exists()


def test_the_schema_knows_decoders() -> None:
    schema = json.loads((ROOT / "specs/spec.schema.json").read_text())
    assert "CausalLmSpec" in schema["$defs"]


def test_a_base_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    spec = write_decoder(tmp_path, FAMILIES["Llama"])
    (tmp_path / "base/tokenizer.json").unlink()
    with pytest.raises(BaseModelError, match=r"no tokenizer.json, which a decoder needs"):
        build(spec, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts/decoder").exists()


def test_a_build_without_the_model_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai.models.builder", None)
    with pytest.raises(BaseModelError, match=r"pip install 'loraexport\[genai\]'"):
        build(write_decoder(tmp_path, FAMILIES["Llama"]), tmp_path / "out")
