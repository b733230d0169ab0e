"""Contract 2: the fields of a LoraConfig, one by one: read, refused by name, or without effect."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from support.adapters import write_adapter
from support.peft_adapters import SITES, Model, adapter, change_config, peft_layers

from loraexport_runtime.adapters.config import FIELDS, Refused
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.tensors import read_lora_weights
from loraexport_runtime.errors import AdapterConfigError

torch.set_num_threads(1)


def test_every_field_of_peft_is_classified() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields - set(FIELDS) == set(), "classify these in FIELDS"
    assert set(FIELDS) - fields == set(), "PEFT does not know these"


def test_the_defaults_of_peft_are_accepted(tmp_path: Path) -> None:
    defaults = json.loads(json.dumps(peft.LoraConfig(r=2).to_dict(), default=sorted))
    defaults["peft_type"] = "LORA"
    header = read_adapter(adapter(tmp_path, **defaults))
    assert {module.scaling for module in header.modules.values()} == {4.0}


REFUSED = {
    "bias": "all",
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.gate"],
    "layer_replication": [[0, 4], [2, 5]],
    "alora_invocation_tokens": [5],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"num_samples": 2},
    "ensure_weight_tying": True,
}


def test_every_refused_field_has_a_case() -> None:
    assert set(REFUSED) == {key for key, rule in FIELDS.items() if isinstance(rule, Refused)}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_field_is_named(tmp_path: Path, key: str) -> None:
    folder = adapter(tmp_path, **{key: REFUSED[key]})
    with pytest.raises(AdapterConfigError, match=rf"{key} = .* is not supported: .*Retrain"):
        read_adapter(folder)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_neutral_value_of_a_refused_field_is_accepted(tmp_path: Path, key: str) -> None:
    rule = FIELDS[key]
    assert isinstance(rule, Refused)
    default = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}[key]
    for value in (*rule.neutral, default):
        assert read_adapter(adapter(tmp_path, **{key: value})).max_rank == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task_type", "CAUSAL_LM"),
        ("lora_dropout", 0.5),
        ("fan_in_fan_out", True),
        ("exclude_modules", ["x"]),
        ("target_modules", "all-linear"),
        ("velora_config", {"rank": 1}),
        ("inference_mode", True),
    ],
)
def test_field_without_effect_changes_nothing(tmp_path: Path, key: str, value: object) -> None:
    plain, other = adapter(tmp_path / "a"), adapter(tmp_path / "b", **{key: value})
    header, same = read_adapter(plain), read_adapter(other)
    assert [one.scaling for one in same.modules.values()] == [
        one.scaling for one in header.modules.values()
    ]
    assert same.modules.keys() == header.modules.keys()


def test_unknown_field(tmp_path: Path) -> None:
    folder = adapter(tmp_path, use_magic=True)
    with pytest.raises(AdapterConfigError, match=r"unknown field 'use_magic' = True.*not ignored"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("r", "16", "a positive integer, got '16'"),
        ("r", 2.0, "a positive integer, got 2.0"),
        ("r", 0, "a positive integer, got 0"),
        ("r", True, "a positive integer, got True"),
        ("lora_alpha", "8", "a finite number, got '8'"),
        ("lora_alpha", False, "a finite number, got False"),
        ("lora_alpha", math.nan, "a finite number, got nan"),
        ("lora_alpha", 10**400, "a finite number, got 1000"),
        ("use_rslora", "no", "true or false, got 'no'"),
        ("use_rslora", 1, "true or false, got 1"),
        ("use_dora", "yes", "true or false, got 'yes'"),
        ("lora_bias", 1, "true or false, got 1"),
        ("modules_to_save", "classifier", "a list of module names, got 'classifier'"),
        ("modules_to_save", [""], r"a list of module names, got \[''\]"),
        ("modules_to_save", [1], r"a list of module names, got \[1\]"),
        ("rank_pattern", ["q"], "an object of positive integers"),
        ("rank_pattern", {"q": 2.5}, "an object of positive integers"),
        ("alpha_pattern", {"q": "8"}, "an object of finite numbers"),
        ("alpha_pattern", {"q": math.inf}, "an object of finite numbers"),
    ],
)
def test_wrong_type_of_a_field(tmp_path: Path, key: str, value: object, expected: str) -> None:
    write_adapter(tmp_path / "adapter", SITES, rank=2)
    change_config(tmp_path / "adapter", **{key: value})
    with pytest.raises(AdapterConfigError, match=f"{key}: expected {expected}"):
        read_adapter(tmp_path / "adapter")


def test_pattern_that_is_no_regular_expression(tmp_path: Path) -> None:
    folder = adapter(tmp_path, alpha_pattern={"q(": 4})
    with pytest.raises(AdapterConfigError, match=r"alpha_pattern: 'q\(' is no regular expression"):
        read_adapter(folder)


# ---------------------------------------------------------------- init_lora_weights


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_init_that_leaves_the_base_alone(tmp_path: Path, init: object) -> None:
    assert read_adapter(adapter(tmp_path, init_lora_weights=init)).modules


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_init_that_changes_the_base_names_the_conversion(tmp_path: Path, init: str) -> None:
    folder = adapter(tmp_path, init_lora_weights=init)
    expected = f"init_lora_weights = '{init}' changes the base.*path_initial_model_for_weight_conv"
    with pytest.raises(AdapterConfigError, match=expected):
        read_adapter(folder)


def test_loftq_has_no_conversion(tmp_path: Path) -> None:
    folder = adapter(tmp_path, init_lora_weights="loftq")
    with pytest.raises(AdapterConfigError, match=r"no conversion for it.*merge_and_unload\(\)"):
        read_adapter(folder)


@pytest.mark.parametrize("init", ["mica", "tomorrow", None])
def test_other_inits_are_refused(tmp_path: Path, init: object) -> None:
    folder = adapter(tmp_path, init_lora_weights=init)
    with pytest.raises(AdapterConfigError, match=r"is not supported; supported are true.*retrain"):
        read_adapter(folder)


def test_the_named_conversion_of_pissa_gives_a_plain_adapter(tmp_path: Path) -> None:
    """What the message advises, done with PEFT: W + s B A of the result is the trained layer."""
    torch.manual_seed(0)
    model = Model()
    original = model.q.weight.detach().clone()
    config = peft.LoraConfig(r=2, target_modules="q", init_lora_weights="pissa")
    wrapped = peft.get_peft_model(model, config)
    wrapped.peft_config["default"].init_lora_weights = True  # else PEFT refuses the conversion
    wrapped.save_pretrained(str(tmp_path / "initial"))
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    layer = peft_layers(wrapped)["q"]
    with torch.no_grad():
        layer.lora_B["default"].weight.add_(0.1)
    trained = layer.base_layer.weight + layer.get_delta_weight("default")

    wrapped.save_pretrained(str(tmp_path / "raw"))
    with pytest.raises(AdapterConfigError, match="pissa"):
        read_adapter(tmp_path / "raw")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that PiSSA adapters do not mix
        wrapped.save_pretrained(
            str(tmp_path / "converted"),
            path_initial_model_for_weight_conversion=str(tmp_path / "initial"),
        )
    weights = read_lora_weights(read_adapter(tmp_path / "converted"))["q"]
    assert weights.a.shape[0] == 4, "PEFT doubles the rank"
    plain = original.numpy() + weights.scaling * weights.b @ weights.a
    np.testing.assert_allclose(plain, trained.detach().numpy(), atol=1e-5)
