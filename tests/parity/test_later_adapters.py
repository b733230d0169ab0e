"""Adapters of every feature that a running session loads, and what has no place there."""

import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from support.peft_adapters import change_config
from support.peft_features import (
    BASES,
    LENGTHS,
    PEFTS_WORST,
    World,
    assert_is_peft,
    error_of,
    make_inputs,
    plain_onnx,
    run,
    run_plain,
)

from loraexport_runtime import (
    AdapterError,
    AdapterWeightsError,
    InputError,
    WeightsError,
)

# PEFT says of an embedding LoRA that it saves the embedding too; of lora_bias that it cannot be
# merged into a layer without a bias, and, wrongly, that its tensors are shards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning"),
]


@pytest.mark.parametrize("name", ["dora", "lora_bias", "lora_only", "head", "narrow_head"])
def test_features_of_the_spec_let_a_later_adapter_bring_them(world: World, name: str) -> None:
    """The artifact was built from a plain adapter alone, with features: [dora, bias, heads]."""
    session = world.open("llama")
    session.load_adapter(name, world.adapter(f"llama/{name}"), base=world.base("llama"))
    assert_is_peft(world, session, "llama", [name, None, name])


def test_dora_comes_with_base_and_says_so(world: World, tmp_path: Path) -> None:
    session = world.open("llama")
    path = world.adapter("llama/dora")
    with pytest.raises(AdapterError, match=r"uses DoRA.*: pass base=, the directory of the model"):
        session.load_adapter("dora", path)
    torch.manual_seed(1)
    base = BASES["llama"]
    base.saved(base.config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"none of its \d+ tensors is the weight of site"):
        session.load_adapter("dora", path, base=tmp_path)
    assert session.list_adapters().keys() == {"plain"}
    assert_is_peft(world, session, "llama", ["plain", None])


def test_dora_with_a_scale_is_pefts(world: World) -> None:
    """The scale changes ||W + s B A||, and so the output scale of DoRA."""
    session = world.open("llama")
    session.load_adapter("dora", world.adapter("llama/dora"), scale=0.5, base=world.base("llama"))
    inputs = make_inputs(session, "llama")
    found = run(session, inputs, ["dora", None, None, None])[0]
    expected = run_plain(world.merged("llama/dora", scale=0.5), inputs)[0]
    assert error_of(found, expected, inputs["attention_mask"][0]) < PEFTS_WORST
    unscaled = run_plain(world.merged("llama/dora"), inputs)[0]
    assert np.abs(unscaled - expected).max() > 0.05


def test_adapters_of_different_features_take_turns_in_one_slot(world: World) -> None:
    names = ("dora", "head", "lora_only", "plain", "lora_bias", "narrow_head")
    paged = world.open("llama")
    inputs = make_inputs(paged, "llama")
    alone = {}
    for name in names:
        path, base = world.adapter(f"llama/{name}"), world.base("llama")
        paged.load_adapter(name, path, base=base)
        session = world.open("llama")
        session.load_adapter(name, path, base=base)
        alone[name] = run(session, inputs, [name, None, name, name])
    assert len(paged.adapters) == 1
    for name in (*names, *names[::-1]):
        y = run(paged, inputs, [name, None, name, name])
        assert y.tobytes() == alone[name].tobytes(), name


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("roberta/dora", "uses DoRA, for which this artifact has no place; add dora to features"),
        (
            "roberta/lora_bias",
            "brings a bias, for which this artifact has no place; add bias to fe",
        ),
        pytest.param(
            "gpt2/head",
            r"brings 'lm_head', trained whole .*, add features: \[heads\] to the spec",
            marks=pytest.mark.slow,
        ),
        ("llama/wide_head", "needs a build with an adapter whose head is as wide"),
        (
            "roberta/plain",
            r"brings no 'classifier.*', and the base has none .*modules_to_save=\['c",
        ),
    ],
)
def test_a_later_adapter_that_has_no_place_says_what_to_build(
    world: World, key: str, message: str
) -> None:
    base = key.split("/")[0]
    session = world.open(base)
    before = session.list_adapters()
    with pytest.raises(AdapterWeightsError, match=message):
        session.load_adapter("late", world.adapter(key), base=world.base(base))
    assert session.list_adapters() == before


def test_an_adapter_that_has_lost_its_head(world: World, tmp_path: Path) -> None:
    """PEFT does not load it; served with the base's head it would be another adapter."""
    folder = shutil.copytree(world.adapter("llama/plain"), tmp_path / "lost")
    change_config(folder, modules_to_save=["classifier", "score"])
    session = world.open("llama")
    with pytest.raises(AdapterWeightsError, match=r"modules_to_save = .* lack 'score'; config and"):
        session.load_adapter("lost", folder)
    assert "lost" not in session.list_adapters()


def test_a_base_without_a_head_serves_rows_with_an_adapter_only(world: World) -> None:
    session = world.session("roberta")
    inputs = make_inputs(session, "roberta")
    with pytest.raises(
        InputError, match=r"adapters\[2\] names no adapter, but the base has no 'cl"
    ):
        run(session, inputs, ["head", "wide_head", None, "head"])
    with pytest.raises(InputError, match=r"adapters\[0\] names no adapter, but the base has no"):
        session.run(inputs)


def test_a_carried_dora_adapter_needs_no_base(world: World) -> None:
    session = world.open("bert")
    inputs = make_inputs(session, "bert")
    rows = ["dora", "dora_embedding", None, "plain"]
    before = run(session, inputs, rows)
    for name in ("dora", "dora_embedding"):
        session.unload_adapter(name)
        session.load_adapter(name)
    assert np.abs(run(session, inputs, rows) - before).max() < 1e-5
    with pytest.raises(AdapterError, match="pass base="):
        session.load_adapter("dora", scale=0.5)
    session.load_adapter("dora", scale=0.5, base=world.base("bert"))
    found = run(session, inputs, rows)
    expected = run_plain(world.merged("bert/dora", scale=0.5), inputs)[0]
    assert error_of(found[0], expected, inputs["attention_mask"][0]) < PEFTS_WORST


def test_the_slots_with_features_as_one_onnx_adapter(world: World, tmp_path: Path) -> None:
    """onnxruntime's own LoraAdapter API; a slot without an adapter is the base."""
    session = world.open("bert")
    empty = session.adapters["lora_only"]
    session.unload_adapter("lora_only")
    slots = session.export_adapters(tmp_path)
    adapter = ort.LoraAdapter()
    adapter.Load(str(tmp_path / "model.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    plain = plain_onnx(world.artifact("bert"))
    names = ["dora", "wide_head", None, "dora_embedding", "lora_bias", None]
    inputs = make_inputs(session, "bert", [LENGTHS[row % 4] for row in range(len(names))])
    ids = np.array([slots[name] if name else 0 for name in names])
    ids[-1] = empty
    y = plain.run(None, {**inputs, "adapter_ids": ids}, options)[0]
    assert y.tobytes() == run(session, inputs, names).tobytes()
