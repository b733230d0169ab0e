"""Scalings, ranks and deltas of an adapter, held to PEFT's own layers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from support.peft_adapters import Model, peft_layers, save_peft
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraexport.parity.oracle import reference_scaling
from loraexport_runtime.adapters.header import AdapterHeader, read_adapter
from loraexport_runtime.adapters.tensors import read_lora_weights
from loraexport_runtime.errors import AdapterWeightsError

torch.set_num_threads(1)

COMBINATIONS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q", "v"]},
    "rslora": {"target_modules": ["q", "v"], "use_rslora": True},
    "rank_by_suffix": {"target_modules": ["q", "qv"], "rank_pattern": {"q": 2}},
    "alpha_by_suffix": {"target_modules": ["q", "v", "qv"], "alpha_pattern": {"v": 3, "qv": 5}},
    "whole_names": {
        "target_modules": ["q", "v"],
        "rank_pattern": {"encoder.layers.1.q": 2},
        "alpha_pattern": {"encoder.layers.1.v": 1.5},
    },
    "regexes": {
        "target_modules": ["q", "v"],
        "rank_pattern": {r"layers\.(1|2)\.[qv]": 2, r".*\.1\d\.q": 6},
        "alpha_pattern": {r"layers\.\d\.q": 32},
        "use_rslora": True,
    },
    "two_match_first_wins": {
        "target_modules": ["q", "v"],
        "rank_pattern": {r"layers\.1\.q": 2, "q": 5},
        "alpha_pattern": {r"layers\.1\.q": 100, r"layers\.\d\.q": 3, "q": 7},
    },
    "alternation": {"target_modules": ["q", "v"], "alpha_pattern": {"x|v": 3}},
    "one_more_letter": {"target_modules": ["v", "qv"], "alpha_pattern": {".v": 3, "v": 9}},
    "regex_target": {
        "target_modules": r"encoder\.layers\.[0-3]\.(q|v)",
        "rank_pattern": {"q": 3},
        "use_rslora": True,
    },
    "some_layers": {
        "target_modules": ["v", "qv"],
        "layers_to_transform": [1, 10],
        "layers_pattern": "layers",
        "alpha_pattern": {r"10\.v": 4},
    },
    "exclusions": {"target_modules": ["q", "v"], "exclude_modules": r".*\.v", "use_rslora": True},
}


def compare_with_peft(folder: Path) -> AdapterHeader:
    """Ranks and scalings as PEFT gives them when it loads the directory."""
    loaded = peft.PeftModel.from_pretrained(Model(), str(folder))
    layers = peft_layers(loaded)
    header = read_adapter(folder)
    assert header.modules.keys() == layers.keys()
    for name, layer in layers.items():
        assert header.modules[name].rank == layer.r["default"], name
        expected = layer.scaling["default"]
        assert header.modules[name].scaling == pytest.approx(expected, rel=1e-15), name
    return header


def compare_reference(folder: Path) -> None:
    """The oracle's scalings, which share no code with the parser, are the same."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, module in read_adapter(folder).modules.items():
        assert reference_scaling(config, name) == pytest.approx(module.scaling, rel=1e-15), name


@pytest.mark.parametrize("name", COMBINATIONS)
def test_scalings_are_those_of_peft(tmp_path: Path, name: str) -> None:
    trained = save_peft(tmp_path, Model(), r=4, lora_alpha=16, **COMBINATIONS[name])
    header = compare_with_peft(tmp_path)
    compare_reference(tmp_path)
    for module, layer in peft_layers(trained).items():
        assert header.modules[module].scaling == pytest.approx(layer.scaling["default"], rel=1e-15)
    if "pattern'" in str(COMBINATIONS[name]):
        assert len({(one.rank, one.scaling) for one in header.modules.values()}) > 1, "vacuous"


ANCHORED = {"target_modules": ["q"], "rank_pattern": {"^q": 2}, "alpha_pattern": {"^q": 5}}


def test_anchored_pattern_matches_the_whole_name_only(tmp_path: Path) -> None:
    """`^q` is the outer q alone: PEFT's optional prefix cannot stand before an anchor."""
    save_peft(tmp_path, Model(), r=4, lora_alpha=16, **ANCHORED)
    header = compare_with_peft(tmp_path)
    assert [name for name, one in header.modules.items() if one.rank == 2] == ["q"]


def test_reference_reads_an_anchored_pattern_alike(tmp_path: Path) -> None:
    save_peft(tmp_path, Model(), r=4, lora_alpha=16, **ANCHORED)
    compare_reference(tmp_path)


def test_order_of_the_file_counts_not_that_of_the_training(tmp_path: Path) -> None:
    """PEFT sorts the keys when it saves, so its own load may see another first match."""
    pattern = {"q": 7, r"layers\.1\.q": 100}
    config = {"target_modules": ["q"], "alpha_pattern": pattern}
    trained = save_peft(tmp_path, Model(), r=4, lora_alpha=16, **config)
    assert peft_layers(trained)["encoder.layers.1.q"].scaling["default"] == 7 / 4
    assert compare_with_peft(tmp_path).modules["encoder.layers.1.q"].scaling == 100 / 4
    compare_reference(tmp_path)


def test_rank_of_a_reordered_pattern_is_refused(tmp_path: Path) -> None:
    config = {"target_modules": ["q"], "rank_pattern": {"q": 5, r"layers\.1\.q": 2}}
    save_peft(tmp_path, Model(), r=4, **config)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    expected = r"'encoder\.layers\.1\.q': A has rank 5, but the config gives r = 2; several keys"
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(tmp_path)


def test_layers_to_transform_and_exclusions_show_in_the_tensors(tmp_path: Path) -> None:
    save_peft(tmp_path, Model(), r=2, **COMBINATIONS["some_layers"])
    modules = read_adapter(tmp_path).modules
    assert sorted(modules) == [
        f"encoder.layers.{n}.{name}" for n in (1, 10) for name in ("qv", "v")
    ]


def test_delta_of_a_linear_is_that_of_peft(tmp_path: Path) -> None:
    wrapped = save_peft(tmp_path, Model(), r=3, lora_alpha=5, target_modules=["v"], use_rslora=True)
    weights = read_lora_weights(read_adapter(tmp_path))
    for name, layer in peft_layers(wrapped).items():
        lora = weights[name]
        delta = layer.get_delta_weight("default").detach().numpy()
        np.testing.assert_allclose(lora.scaling * lora.b @ lora.a, delta, rtol=1e-5, atol=1e-6)


def test_conv1d_factors_are_stored_like_those_of_a_linear(tmp_path: Path) -> None:
    model = nn.Module()
    model.c_attn = Conv1D(12, 8)  # weight [in 8, out 12]
    wrapped = save_peft(tmp_path, model, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    header = read_adapter(tmp_path)
    assert (header.modules["c_attn"].in_features, header.modules["c_attn"].out_features) == (8, 12)
    lora = read_lora_weights(header)["c_attn"]
    delta = peft_layers(wrapped)["c_attn"].get_delta_weight("default").detach().numpy()
    np.testing.assert_allclose((lora.scaling * lora.b @ lora.a).T, delta, rtol=1e-5, atol=1e-6)
