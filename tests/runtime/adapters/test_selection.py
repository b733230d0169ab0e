"""Which modules a config selects, held to PEFT's own rule; tensors of others are refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from support.adapters import write_adapter
from support.peft_adapters import Model, adapter, change_config, save_peft

from loraexport_runtime import AdapterConfigError, AdapterWeightsError
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.selection import Selection

NAMES = (
    "q",
    "encoder.q",
    "encoder.layers.1.q",
    "encoder.layers.10.q",
    "encoder.layers.1.qv",
    "encoder.layers.1.experts.10.v",
    "layers.1.q",
    "blocks.1.v",
    "model.blocks.1.v",
)
CONFIGS: tuple[dict[str, Any], ...] = (
    {"target_modules": ["q"]},
    {"target_modules": ["q", "v"], "exclude_modules": ["layers.1.q"]},
    {"target_modules": ["encoder.layers.1.q", "v"]},
    {"target_modules": []},
    {"target_modules": r"(?i).*\.1\.(Q|v)"},
    {"target_modules": "q|encoder.q"},
    {"target_modules": ["q", "v"], "exclude_modules": r".*1\.q"},
    {"target_modules": ["q", "v"], "layers_to_transform": [1]},
    {"target_modules": ["q", "v"], "layers_to_transform": 10},
    {"target_modules": ["q", "v"], "layers_to_transform": 1, "layers_pattern": "layers"},
    {"target_modules": ["v"], "layers_to_transform": [10], "layers_pattern": ["blocks", "experts"]},
    {"target_modules": ["v", "q"], "layers_to_transform": [1], "layers_pattern": "(layers|blocks)"},
    {"target_modules": ["v"], "layers_to_transform": [], "layers_pattern": None},
    {"target_modules": ["layers.1.q"], "layers_to_transform": [10]},
    {"target_modules": ["q", "v"], "modules_to_save": ["layers"]},
    {"target_modules": ["q", "v"], "modules_to_save": ["layer", "experts.10", "blocks.1.v"]},
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_modules_that_peft_selects(config: dict[str, Any]) -> None:
    selection = Selection(config, Path("adapter_config.json"))
    theirs = peft.LoraConfig(**config)
    for name in NAMES:
        found = check_target_module_exists(theirs, name)
        is_taken = bool(found) and not isinstance(found, _ExcludedModule)
        assert (selection.field_against(name) is None) == is_taken, name


@pytest.mark.parametrize("targets", [None, "all-linear", "All-Linear"])
def test_every_module_where_the_config_names_none(targets: str | None) -> None:
    selection = Selection({"target_modules": targets}, Path("adapter_config.json"))
    assert {selection.field_against(name) for name in NAMES} == {None}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", ["v"]),
        ("target_modules", r".*\.1\.\w"),
        ("exclude_modules", ["q"]),
        ("layers_to_transform", [1]),
    ],
)
def test_tensors_that_peft_leaves_out_are_refused(tmp_path: Path, key: str, value: object) -> None:
    """PEFT passes over them with a warning: another adapter than the tensors say."""
    save_peft(tmp_path, Model(), r=2, target_modules=["layers.0.q", "layers.1.v"])
    change_config(tmp_path, **{"target_modules": ["q", "v"], key: value})
    with pytest.warns(UserWarning, match="unexpected|not used|missing"):
        peft.PeftModel.from_pretrained(Model(), str(tmp_path))
    expected = rf"'encoder\.layers\.0\.q' has LoRA, but the config's {key} = .* leaves it out"
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("target_modules", 5, "a text or a list of texts, got 5"),
        ("target_modules", [["q"]], "a text or a list of texts, got"),
        ("exclude_modules", {"q": 1}, "a text or a list of texts, got"),
        ("layers_pattern", 1.5, "a text or a list of texts, got 1.5"),
        ("layers_to_transform", "1", "a number or a list of numbers, got '1'"),
        ("layers_to_transform", [None], "a number or a list of numbers, got"),
    ],
)
def test_fields_of_another_type(tmp_path: Path, key: str, value: object, expected: str) -> None:
    with pytest.raises(AdapterConfigError, match=f"{key}: expected {expected}"):
        read_adapter(adapter(tmp_path, **{key: value}))


def test_a_target_without_end_is_given_up(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", {"a" * 60 + ".q": (8, 8)}, rank=2)
    change_config(folder, target_modules=r"(?:(?:\w|\w\w)+)+")
    with pytest.raises(AdapterConfigError, match=r"target_modules: .* takes too long to match"):
        read_adapter(folder)
