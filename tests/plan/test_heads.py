"""Heads that a base has or lacks, under whatever name a family gives their layers."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from support.builds import Project

import loraexport_runtime as lr
from loraexport.hf.quiet import quiet_models
from loraexport.pipeline.build import build
from loraexport.plan.plan import AnyPlan, make_plan
from loraexport.spec.reader import read_spec
from loraexport_runtime.errors import AdapterWeightsError

_SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DISTILBERT = {"vocab_size": 60, "dim": 32, "hidden_dim": 48, "n_layers": 1, "n_heads": 4}
TEXTS = "sequence-classification"
IMAGES = "image-classification"
HEADS: dict[str, tuple[Any, str, list[str], list[str]]] = {
    "DistilBERT": (
        tf.DistilBertConfig(**_DISTILBERT),
        "q_lin",
        ["pre_classifier", "classifier"],
        ["pre_classifier", "classifier"],
    ),
    "RoBERTa": (
        tf.RobertaConfig(**_SIZES),
        "query",
        ["classifier"],
        ["classifier.dense", "classifier.out_proj"],
    ),
    "ELECTRA": (
        tf.ElectraConfig(**_SIZES, embedding_size=32),
        "query",
        ["classifier"],
        ["classifier.dense", "classifier.out_proj"],
    ),
    "BERT reranker": (
        tf.BertConfig(**_SIZES, num_labels=1),
        "query",
        ["pooler", "classifier"],
        ["bert.pooler.dense", "classifier"],
    ),
    "DeBERTa": (
        tf.DebertaV2Config(**_SIZES),
        "query_proj",
        ["pooler", "classifier"],
        ["pooler.dense", "classifier"],
    ),
    "ViT": (
        tf.ViTConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            patch_size=4,
            image_size=8,
        ),
        "q_proj",
        ["classifier"],
        ["classifier"],
    ),
}
"""Family -> config, where LoRA applies, modules_to_save, and the layers that these are."""


def write(folder: Path, name: str, headed: bool, *saved: bool, **changes: Any) -> Path:
    """The spec of a base with its head or without, and an adapter for each of `saved`."""
    config, target, heads, _ = HEADS[name]
    auto = auto_class(name)
    torch.manual_seed(0)
    model = auto.from_config(config)
    bare = model.get_submodule(model.base_model_prefix)
    if name == "BERT reranker":
        bare = tf.BertForMaskedLM(config)  # whose file has no pooler
    (model if headed else bare).save_pretrained(folder / "base")
    for index, whole in enumerate(saved):
        modules = heads if whole else None
        lora = LoraConfig(
            r=2, target_modules=[target], modules_to_save=modules, init_lora_weights=False
        )
        with quiet_models():
            get_peft_model(auto.from_config(config), lora).save_pretrained(folder / f"a{index}")
    return Project(folder).spec(
        base={"kind": "transformers", "path": "base", "task": IMAGES if name == "ViT" else TEXTS},
        adapters=[{"name": f"a{index}", "path": f"a{index}"} for index in range(len(saved))],
        **changes,
    )


def auto_class(name: str) -> Any:
    if name == "ViT":
        return tf.AutoModelForImageClassification
    return tf.AutoModelForSequenceClassification


def plan(folder: Path, name: str, headed: bool, *saved: bool, **changes: Any) -> AnyPlan:
    return make_plan(read_spec(write(folder, name, headed, *saved, **changes)), folder)


def heads_of(planned: AnyPlan) -> dict[str, bool]:
    """The layers that differ whole, and whether the base has them."""
    layers = [one.layer for one in planned.layers]
    return {layer.name: layer.in_base for layer in layers if layer.stack("weight") is not None}


@pytest.mark.parametrize("name", HEADS)
def test_rows_without_a_head_take_the_bases(name: str, tmp_path: Path) -> None:
    assert heads_of(plan(tmp_path, name, True, True, False)) == dict.fromkeys(HEADS[name][3], True)


@pytest.mark.parametrize("name", HEADS)
def test_a_base_without_a_head_takes_adapters_that_bring_one(name: str, tmp_path: Path) -> None:
    assert heads_of(plan(tmp_path, name, False, True, True)) == dict.fromkeys(HEADS[name][3], False)


@pytest.mark.parametrize("name", HEADS)
def test_a_base_without_a_head_names_what_an_adapter_lacks(name: str, tmp_path: Path) -> None:
    """Also where no adapter brings one: transformers would draw it at random."""
    layers = "|".join(HEADS[name][3])
    message = rf"/a.: it brings no '({layers})', and the base has none of its own; train it with"
    with pytest.raises(AdapterWeightsError, match=message):
        plan(tmp_path, name, False, True, False)
    with pytest.raises(AdapterWeightsError, match=message):
        plan(tmp_path, name, False, False)


def test_later_adapters_may_bring_every_layer_of_a_head(tmp_path: Path) -> None:
    planned = plan(tmp_path, "DistilBERT", True, False, features=["heads"])
    assert heads_of(planned) == {"pre_classifier": True, "classifier": True}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "DistilBERT" else pytest.param(name, marks=pytest.mark.slow)
        for name in HEADS
    ],
)
def test_rows_get_the_logits_of_peft(name: str, tmp_path: Path) -> None:
    """Of an adapter with a head of its own, of one without, and of the base, in one batch."""
    torch.set_num_threads(1)
    spec = write(tmp_path, name, True, True, False, export={"formats": ["onnx"]})
    artifact, _ = build(spec, tmp_path / "out")
    generator = np.random.default_rng(4)
    inputs = {"input_ids": generator.integers(3, 60, (4, 7))}
    if name == "ViT":
        inputs = {"pixel_values": generator.standard_normal((4, 3, 8, 8)).astype(np.float32)}
    with lr.load_model(artifact, threads=1) as session:
        masks = {"attention_mask": 1, "token_type_ids": 0}
        names = {entry.name for entry in session.model.inputs}
        inputs |= {each: np.full((4, 7), masks[each]) for each in names & masks.keys()}
        rows = ["a0", "a1", None, "a0"]
        found = session.run(inputs, rows)["logits"]
    with quiet_models():
        base = auto_class(name).from_pretrained(tmp_path / "base").eval()
        model = PeftModel.from_pretrained(base, tmp_path / "a0", "a0")
        model.load_adapter(tmp_path / "a1", "a1")
    tensors = {key: torch.from_numpy(value) for key, value in inputs.items()}
    for at, row in enumerate(rows):
        model.set_adapter(row or "a0")
        with torch.no_grad(), nullcontext() if row else model.disable_adapter():
            expected = model.eval()(**tensors).logits[at].numpy()
        np.testing.assert_allclose(found[at], expected, rtol=1e-4, atol=1e-5)
