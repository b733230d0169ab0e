"""What an adapter brings beside A and B (magnitudes, biases, heads), held to PEFT."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support.adapters import write_adapter
from support.peft_adapters import adapter, change_config, peft_layers
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraexport.parity.oracle import read_reference_adapter
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.sites import check_base_copies, match_sites
from loraexport_runtime.adapters.tensors import read_lora_weights, read_saved_weights
from loraexport_runtime.contract.naming import NO_NAMING
from loraexport_runtime.errors import AdapterWeightsError, WeightsError

torch.set_num_threads(1)


class Mixed(nn.Module):
    """One layer of each kind that PEFT's LoRA knows and a whole model has a place for."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.q = nn.Linear(8, 6)
        self.v = nn.Linear(8, 4, bias=False)
        self.c_attn = Conv1D(12, 8)  # weight [in 8, out 12]
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)


@dataclasses.dataclass(frozen=True)
class Brought:
    """A LoraConfig on Mixed, and which modules bring what beside A and B."""

    config: dict[str, Any]
    features: tuple[str, ...]
    magnitude: tuple[str, ...] = ()
    lora_bias: tuple[str, ...] = ()
    base_bias: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


BROUGHT = {
    "rslora": Brought({"target_modules": ["q", "words"], "use_rslora": True}, ()),
    "dora": Brought(
        {"target_modules": ["q", "c_attn", "words"], "use_dora": True},
        ("dora",),
        magnitude=("c_attn", "q", "words"),
    ),
    "lora_bias": Brought(
        {"target_modules": ["q", "c_attn"], "lora_bias": True, "use_rslora": True},
        ("bias",),
        lora_bias=("c_attn", "q"),
    ),
    "lora_only": Brought(
        {"target_modules": ["q", "v", "c_attn", "words"], "bias": "lora_only"},
        ("bias",),
        base_bias=("c_attn", "q"),  # the others have none
    ),
    "both_biases": Brought(
        {"target_modules": ["q"], "bias": "lora_only", "lora_bias": True},
        ("bias",),
        lora_bias=("q",),
        base_bias=("q",),
    ),
    "head": Brought(
        {"target_modules": ["q"], "modules_to_save": ["head"]}, ("heads",), saved=("head",)
    ),
    "all": Brought(
        {
            "target_modules": ["q", "v"],
            "use_dora": True,
            "bias": "lora_only",
            "modules_to_save": ["head"],
        },
        ("dora", "bias", "heads"),
        magnitude=("q", "v"),
        base_bias=("q",),
        saved=("head",),
    ),
}


def save_brought(folder: Path, model: nn.Module, config: dict[str, Any]) -> peft.PeftModel:
    """Apply a LoraConfig, give everything that it trains random values, save."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        # That Conv1D needs fan_in_fan_out; that a bias of B has one dimension.
        warnings.simplefilter("ignore", UserWarning)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, **config))
        with torch.no_grad():
            for value in wrapped.parameters():
                if value.requires_grad:
                    value.copy_(torch.randn_like(value) * 0.3)
        wrapped.save_pretrained(str(folder))
    return wrapped


@pytest.mark.parametrize("case", BROUGHT)
def test_what_peft_saves_beside_a_and_b_is_read(tmp_path: Path, case: str) -> None:
    brought = BROUGHT[case]
    layers = peft_layers(save_brought(tmp_path, Mixed(), brought.config))
    header = read_adapter(tmp_path)
    assert header.features == brought.features
    expected = {
        "magnitude": {
            name: layers[name].lora_magnitude_vector["default"].weight for name in brought.magnitude
        },
        "lora_bias": {name: layers[name].lora_B["default"].bias for name in brought.lora_bias},
        "base_bias": {name: layers[name].base_layer.bias for name in brought.base_bias},
    }
    weights = read_lora_weights(header)
    for role, values in expected.items():
        found = {name: getattr(one, role) for name, one in weights.items()}
        assert {name for name, one in found.items() if one is not None} == set(values), role
        for name, value in values.items():
            np.testing.assert_array_equal(found[name], value.detach().numpy())
    assert tuple(header.saved) == brought.saved


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("case", BROUGHT)
def test_the_oracle_merges_as_peft_does(tmp_path: Path, case: str, scale: float) -> None:
    torch.manual_seed(1)
    model = Mixed().double()
    kept = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    wrapped = save_brought(tmp_path, model, BROUGHT[case].config)
    for layer in peft_layers(wrapped).values():
        layer.scaling["default"] *= scale
    merged: Any = wrapped.merge_and_unload()

    sites = ["words", "q", "v", "c_attn", "head"]
    reference = read_reference_adapter(tmp_path, sites, scale)
    changed = set()
    for site in sites:
        turned = site in ("words", "c_attn")  # stored [in, out]
        weight, own = kept[f"{site}.weight"], merged.get_submodule(site)
        expected = own.weight.detach().numpy()
        found, bias = reference.merge(
            site, weight.T if turned else weight, kept.get(f"{site}.bias")
        )
        np.testing.assert_allclose(found.T if turned else found, expected, rtol=1e-10, atol=1e-12)
        if np.abs(weight - expected).max() > 0.01:
            changed.add(site)
        if bias is None:
            assert getattr(own, "bias", None) is None
        else:
            np.testing.assert_allclose(bias, own.bias.detach().numpy(), rtol=1e-10)
    brought = {*BROUGHT[case].config["target_modules"], *BROUGHT[case].saved}
    assert changed == brought, "vacuous"


def test_the_older_name_of_a_magnitude(tmp_path: Path) -> None:
    save_brought(tmp_path, Mixed(), BROUGHT["dora"].config)
    before = read_lora_weights(read_adapter(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    renamed = {
        f"{name}.weight" if name.endswith("lora_magnitude_vector") else name: value
        for name, value in load_file(file).items()
    }
    save_file(renamed, file)
    after = read_lora_weights(read_adapter(tmp_path))
    for name, one in after.items():
        np.testing.assert_array_equal(one.magnitude, before[name].magnitude)


def test_bias_lora_only_without_a_saved_bias_leaves_the_bases_own(tmp_path: Path) -> None:
    """A layer without a bias has none to train, so the config alone promises nothing."""
    assert read_adapter(adapter(tmp_path, bias="lora_only")).features == ()


@pytest.mark.parametrize(
    ("family", "saved"),
    [
        ("Bert", {"classifier": (8, 3, True)}),
        ("Roberta", {"classifier.dense": (8, 8, True), "classifier.out_proj": (8, 3, True)}),
        ("Llama", {"score": (8, 3, False)}),
    ],
)
def test_classifiers_of_transformers(
    tmp_path: Path, family: str, saved: dict[str, tuple[int, int, bool]]
) -> None:
    """Also one that PEFT saves as a composite: each linear layer within is one module."""
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = getattr(transformers, f"{family}Config")(
        **sizes, num_attention_heads=2, num_labels=3, pad_token_id=0
    )
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    targets = ["q_proj" if family == "Llama" else "query"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        wrapped = save_brought(tmp_path, model, {"target_modules": targets, "task_type": "SEQ_CLS"})
    header = read_adapter(tmp_path)
    assert header.features == ("heads",)
    weights = read_saved_weights(header)
    assert {
        name: (one.in_features, one.out_features, one.bias is not None)
        for name, one in header.saved.items()
    } == saved
    merged: Any = wrapped.merge_and_unload()
    for name, one in weights.items():
        own = merged.get_submodule(name)
        np.testing.assert_array_equal(one.weight, own.weight.detach().numpy())
        assert (one.bias is None) == (own.bias is None)
        if one.bias is not None:
            np.testing.assert_array_equal(one.bias, own.bias.detach().numpy())


def test_layer_norm_trained_whole_is_refused_by_name(tmp_path: Path) -> None:
    save_brought(tmp_path, Mixed(), {"target_modules": ["q"], "modules_to_save": ["norm"]})
    expected = r"'norm', trained whole \(modules_to_save\), is no linear layer; only linear"
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(tmp_path)


Q = {"blocks.0.q": (8, 8)}
ROLES = {
    "magnitude": ("lora_magnitude_vector", {"use_dora": True}),
    "lora_bias": ("lora_B.bias", {"lora_bias": True}),
    "base_bias": ("base_layer.bias", {"bias": "lora_only"}),
}


def with_extra(folder: Path, role: str, value: np.ndarray | None, asked: bool) -> Path:
    """An adapter of blocks.0.q whose config asks for a role or not, with its tensor or without."""
    tensor, config = ROLES[role]
    tensors = {} if value is None else {f"base_model.model.blocks.0.q.{tensor}": value}
    return write_adapter(folder / "adapter", Q, config=config if asked else {}, tensors=tensors)


@pytest.mark.parametrize(
    ("role", "asked", "expected"),
    [
        ("magnitude", False, "has its magnitude, but the config says use_dora = False"),
        ("magnitude", True, "lacks its magnitude, but the config says use_dora = True"),
        ("lora_bias", False, "has its lora_bias, but the config says lora_bias = False"),
        ("lora_bias", True, "lacks its lora_bias, but the config says lora_bias = True"),
        ("base_bias", False, "has its base_bias, but the config says bias = 'none'"),
    ],
)
def test_config_and_tensors_that_contradict_each_other(
    tmp_path: Path, role: str, asked: bool, expected: str
) -> None:
    value = None if asked else np.ones(8, np.float32)
    with pytest.raises(AdapterWeightsError, match=rf"'blocks\.0\.q' {expected}; config and wei"):
        read_adapter(with_extra(tmp_path, role, value, asked))


@pytest.mark.parametrize("shape", [(9,), (8, 1), ()])
@pytest.mark.parametrize("role", ROLES)
def test_extra_of_another_shape(tmp_path: Path, role: str, shape: tuple[int, ...]) -> None:
    folder = with_extra(tmp_path, role, np.ones(shape, np.float32), True)
    expected = re.escape(f"{ROLES[role][0]}' has shape {list(shape)}; expected [8]")
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(folder)


@pytest.mark.parametrize("role", ROLES)
def test_quantized_extra(tmp_path: Path, role: str) -> None:
    folder = with_extra(tmp_path, role, np.ones(8, np.int32), True)
    with pytest.raises(AdapterWeightsError, match=rf"{ROLES[role][0]}' is I32; .*dequantize"):
        read_adapter(folder)


@pytest.mark.parametrize("role", ROLES)
def test_extra_that_is_not_finite(tmp_path: Path, role: str) -> None:
    header = read_adapter(with_extra(tmp_path, role, np.full(8, np.nan, np.float32), True))
    with pytest.raises(WeightsError, match=rf"{ROLES[role][0]}': 8 of 8 values are NaN or Inf"):
        read_lora_weights(header)


def test_extra_of_a_module_without_lora(tmp_path: Path) -> None:
    extra = {"base_model.model.blocks.0.k.base_layer.bias": np.ones(8, np.float32)}
    folder = write_adapter(tmp_path, Q, config={"bias": "lora_only"}, tensors=extra)
    with pytest.raises(AdapterWeightsError, match=r"'blocks\.0\.k': lora_A is missing; a site"):
        read_adapter(folder)


def with_head(folder: Path, **tensors: np.ndarray) -> Path:
    """An adapter of blocks.0.q with a whole module `head`."""
    named = {f"base_model.model.head.{name}": value for name, value in tensors.items()}
    config = {"modules_to_save": ["head"]}
    return write_adapter(folder, Q, config=config, tensors=named)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"weight": (8,)}, "is no linear layer; only linear layers can differ by row"),
        ({"weight": (3, 8, 2)}, "is no linear layer"),
        ({"bias": (3,)}, "is no linear layer"),
        ({"weight": (3, 8), "running_mean": (3,)}, "brings 'running_mean'; only linear layers can"),
        (
            {"weight": (3, 8), "bias": (4,)},
            r"has a weight of shape \[3, 8\] and a bias of \[4\]; expected \[3\]",
        ),
    ],
)
def test_whole_module_that_is_no_linear_layer(
    tmp_path: Path, tensors: dict[str, tuple[int, ...]], expected: str
) -> None:
    made = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    with pytest.raises(AdapterWeightsError, match=rf"module 'head', trained whole .*{expected}"):
        read_adapter(with_head(tmp_path, **made))


def test_quantized_head(tmp_path: Path) -> None:
    folder = with_head(tmp_path, weight=np.ones((3, 8), np.int8))
    with pytest.raises(AdapterWeightsError, match=r"head\.weight' is I8; .*dequantize"):
        read_adapter(folder)


def test_head_that_is_not_finite(tmp_path: Path) -> None:
    header = read_adapter(with_head(tmp_path, weight=np.full((3, 8), np.inf, np.float32)))
    with pytest.raises(WeightsError, match=r"head\.weight': 24 of 24 values are NaN or Inf"):
        read_saved_weights(header)


def test_whole_module_that_the_config_does_not_name(tmp_path: Path) -> None:
    with_head(tmp_path, weight=np.ones((3, 8), np.float32))
    change_config(tmp_path, modules_to_save=["classifier"])
    header = read_adapter(tmp_path)
    assert not header.saved
    expected = r"head\.weight', and of this base no weight .* if it was, name it in modules_to_save"
    with pytest.raises(AdapterWeightsError, match=expected):
        check_base_copies(header, {}, {}, NO_NAMING)


def test_head_without_a_place(tmp_path: Path) -> None:
    header = read_adapter(with_head(tmp_path, weight=np.ones((3, 8), np.float32)))
    assert match_sites(header, ["blocks.0.q", "head"], NO_NAMING)["head"] == "head"
    expected = r"brings 'head', trained whole .*Choose a task .*add features: \[heads\] to the spec"
    with pytest.raises(AdapterWeightsError, match=expected):
        match_sites(header, ["blocks.0.q"], NO_NAMING)
