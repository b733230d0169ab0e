"""Tensor names of other tools: taken where PEFT takes them, with the same numbers, or refused."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.peft_adapters import FACTOR, SITES, Model, adapter, peft_layers, save_peft

from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.names import TensorNames
from loraexport_runtime.adapters.tensors import read_lora_weights
from loraexport_runtime.errors import AdapterConfigError, AdapterWeightsError

PREFIX = "base_model.model."


def rename(folder: Path, change: Callable[[str], str]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)


def peft_factors(folder: Path) -> dict[str, np.ndarray]:
    """B of every layer as PEFT loads it; its own initial values are zero."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of keys that it does not find
        model = peft.PeftModel.from_pretrained(Model(), str(folder))
    return {
        name: layer.lora_B["default"].weight.detach().numpy()
        for name, layer in peft_layers(model).items()
    }


@pytest.mark.filterwarnings("ignore:.*lora_B.bias", "ignore:`lora_bias=True`")
def test_the_name_of_the_adapter_in_the_tensors(tmp_path: Path) -> None:
    save_peft(tmp_path, Model(), r=2, target_modules=["v"], lora_bias=True)
    plain = read_adapter(tmp_path)
    assert not plain.has_peft_name
    expected = read_lora_weights(plain)
    rename(tmp_path, lambda name: re.sub(r"(lora_[AB])\.", r"\1.default.", name))
    header = read_adapter(tmp_path)
    assert header.has_peft_name
    factors = peft_factors(tmp_path)
    weights = read_lora_weights(header)
    assert weights.keys() == expected.keys() == factors.keys()
    for name, lora in weights.items():
        np.testing.assert_array_equal(lora.b, expected[name].b)
        np.testing.assert_array_equal(lora.b, factors[name])
        assert lora.lora_bias is not None


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("lora_embedding_A", "embedding_A"),
        ("lora_embedding_B", "embedding_B"),
        ("lora_magnitude_vector", "magnitude"),
        ("lora_magnitude_vector.weight", "magnitude"),
    ],
)
def test_the_name_of_the_adapter_in_embeddings_and_dora(name: str, role: str) -> None:
    kind, _, rest = name.partition(".")
    names = TensorNames((), Path("adapter_model.safetensors"))
    for form in (name, ".".join(filter(None, (kind, "default", rest)))):
        assert names.split(f"{PREFIX}encoder.v.{form}", (2, 2)) == ("encoder.v", role)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name: "_orig_mod." + name, r"torch\.compile's wrapper \(_orig_mod\)"),
        (lambda name: name.replace(PREFIX, PREFIX + "_orig_mod."), r"torch\.compile's wrapper"),
        (lambda name: name.replace("encoder.", "encoder._orig_mod."), r"torch\.compile's wrapper"),
        (lambda name: "module." + name, r"DistributedDataParallel's wrapper \(module\)"),
        (lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."), "FSDP's wrapper"),
        (lambda name: name.removeprefix(PREFIX), f"lacks the prefix '{PREFIX}'"),
        (lambda name: re.sub(r"(lora_[AB])\.", r"\1.sql.", name), "has the name of an adapter in"),
    ],
)
def test_what_peft_does_not_load(tmp_path: Path, change: Callable[[str], str], reason: str) -> None:
    save_peft(tmp_path, Model(), r=2, target_modules=["v"])
    rename(tmp_path, change)
    assert not any(factor.any() for factor in peft_factors(tmp_path).values())
    with pytest.raises(AdapterWeightsError, match=reason) as caught:
        read_adapter(tmp_path)
    assert "save_embedding_layers" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "kohya's tools write"),
        ("lora_te_text_model_layers_0_q_proj.lora_up.weight", "kohya's tools write"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "diffusers writes"),
        ("transformer.blocks.0.attn.to_q.lora_B.weight", "diffusers writes"),
        ("text_encoder.layers.0.q_proj.lora_linear_layer.up.weight", "diffusers writes"),
        (FACTOR + "C.weight", "is of a peft version"),
    ],
)
def test_other_tools(tmp_path: Path, name: str, reason: str) -> None:
    folder = write_adapter(tmp_path, SITES, tensors={name: np.zeros((2, 2), np.float32)})
    with pytest.raises(AdapterWeightsError, match=reason) as caught:
        read_adapter(folder)
    assert "save_embedding_layers" not in str(caught.value)


def test_empty_tensors(tmp_path: Path) -> None:
    empty = {f"{FACTOR}{part}.weight": np.zeros(0, np.float32) for part in "AB"}
    folder = write_adapter(tmp_path, SITES, tensors=empty)
    with pytest.raises(AdapterWeightsError, match="saved under ZeRO-3 without gathering"):
        read_adapter(folder)


def test_both_names_of_one_tensor(tmp_path: Path) -> None:
    twice = {f"{FACTOR}A.default.weight": np.zeros((4, 8), np.float32)}
    folder = write_adapter(tmp_path, SITES, tensors=twice)
    with pytest.raises(AdapterWeightsError, match="are one and the same; remove one"):
        read_adapter(folder)


@pytest.mark.parametrize("key", ["enable_lora", "a_feature_of_tomorrow"])
def test_null_of_an_unknown_field(tmp_path: Path, key: str) -> None:
    """A feature of another version of peft, which is not used."""
    assert read_adapter(adapter(tmp_path, **{key: None})).modules
    with pytest.raises(AdapterConfigError, match=f"unknown field '{key}' = False"):
        read_adapter(adapter(tmp_path, **{key: False}))
