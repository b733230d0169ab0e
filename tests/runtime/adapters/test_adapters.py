"""Contract 2: the tensors of a PEFT directory, and directories that are none."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from support.adapters import write_adapter
from support.peft_adapters import (
    FACTOR,
    SITES,
    Model,
    adapter,
    change_config,
    peft_layers,
    randomise,
)

from loraexport_runtime.adapters.files import digest_adapter
from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.tensors import read_lora_weights
from loraexport_runtime.errors import AdapterConfigError, AdapterWeightsError, WeightsError

torch.set_num_threads(1)


def test_ranks_and_scalings_of_a_written_adapter(tmp_path: Path) -> None:
    folder = adapter(tmp_path, rank_pattern={"v": 4}, alpha_pattern={"q": 3}, use_rslora=True)
    header = read_adapter(folder)
    assert header.rslora
    assert header.max_rank == 4
    assert header.modules["blocks.0.q"].scaling == 3 / math.sqrt(2)
    assert header.modules["blocks.1.v"].scaling == 8 / math.sqrt(4)


@pytest.mark.parametrize(("gone", "named"), [("A.weight", "lora_A"), ("B.weight", "lora_B")])
def test_half_a_pair(tmp_path: Path, gone: str, named: str) -> None:
    folder = write_adapter(tmp_path / "adapter", SITES, tensors={FACTOR + gone: None})
    expected = f"module 'blocks.0.q': {named} is missing; a site needs its pair"
    with pytest.raises(AdapterWeightsError, match=expected):
        read_adapter(folder)


def test_linear_and_embedding_factors_of_one_module(tmp_path: Path) -> None:
    extra = {f"{FACTOR}embedding_A": np.zeros((4, 8), np.float32)}
    folder = write_adapter(tmp_path / "adapter", SITES, tensors=extra)
    with pytest.raises(AdapterWeightsError, match="lora_embedding_B is missing; a site needs"):
        read_adapter(folder)


def test_rank_that_the_config_does_not_give(tmp_path: Path) -> None:
    write_adapter(tmp_path / "adapter", SITES, rank=4)
    change_config(tmp_path / "adapter", r=8)
    with pytest.raises(AdapterWeightsError, match="A has rank 4, but the config gives r = 8"):
        read_adapter(tmp_path / "adapter")


def test_a_and_b_of_different_rank(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter", SITES, tensors={f"{FACTOR}B.weight": np.zeros((8, 5), np.float32)}
    )
    with pytest.raises(AdapterWeightsError, match=r"A has shape \[4, 8\] and B \[8, 5\]"):
        read_adapter(folder)


def test_convolution_factors(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter",
        SITES,
        tensors={f"{FACTOR}A.weight": np.zeros((4, 8, 3, 3), np.float32)},
    )
    with pytest.raises(AdapterWeightsError, match=r"expected \[rank, in\] and \[out, rank\]"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.blocks.0.q.lora_C.weight",
        "base_model.model.blocks.0.q.bias",
        "blocks.0.q.lora_A.weight",
        "base_model.model.classifier.bias",
    ],
)
def test_tensor_that_is_no_factor(tmp_path: Path, name: str) -> None:
    folder = write_adapter(
        tmp_path / "adapter", SITES, tensors={name: np.zeros((2, 2), np.float32)}
    )
    with pytest.raises(AdapterWeightsError, match=f"tensor '{name}' is no LoRA factor"):
        read_adapter(folder)


def test_no_tensor_at_all(tmp_path: Path) -> None:
    with pytest.raises(AdapterWeightsError, match="holds no LoRA tensor at all"):
        read_adapter(write_adapter(tmp_path / "adapter", {}))


def test_quantized_factor(tmp_path: Path) -> None:
    folder = write_adapter(
        tmp_path / "adapter", SITES, tensors={f"{FACTOR}A.weight": np.zeros((4, 8), np.int8)}
    )
    with pytest.raises(AdapterWeightsError, match=r"lora_A\.weight' is I8; .*dequantize"):
        read_adapter(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    b = np.zeros((8, 4), np.float32)
    b[1, 1] = value
    folder = write_adapter(tmp_path / "adapter", SITES, tensors={f"{FACTOR}B.weight": b})
    header = read_adapter(folder)
    assert read_lora_weights(header, ["blocks.1.v"]).keys() == {"blocks.1.v"}
    with pytest.raises(WeightsError, match=r"lora_B\.weight': 1 of 32 values are NaN or Inf"):
        read_lora_weights(header)


def test_bfloat16_factors_are_read_exactly(tmp_path: Path) -> None:
    a = np.random.default_rng(0).standard_normal((4, 8)).astype(ml_dtypes.bfloat16)
    folder = write_adapter(tmp_path / "adapter", SITES, tensors={f"{FACTOR}A.weight": a})
    read = read_lora_weights(read_adapter(folder))["blocks.0.q"].a
    assert read.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.astype(np.float32), a.astype(np.float32))


def test_bfloat16_adapter_of_peft(tmp_path: Path) -> None:
    model = Model().to(torch.bfloat16)
    config = peft.LoraConfig(r=2, target_modules=["v"])
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    randomise(wrapped)
    wrapped.save_pretrained(str(tmp_path))
    header = read_adapter(tmp_path)
    assert {module.a[1].dtype for module in header.modules.values()} == {"BF16"}
    weights = read_lora_weights(header)
    for name, layer in peft_layers(wrapped).items():
        stored = layer.lora_B["default"].weight.detach().float().numpy()
        np.testing.assert_array_equal(weights[name].b.astype(np.float32), stored)


def test_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(AdapterConfigError, match=r"adapter_config\.json: no such file; a PEFT ada"):
        read_adapter(tmp_path)


def test_a_folder_of_adapters_names_them(tmp_path: Path) -> None:
    for name in ("sql", "chat", ".hidden"):
        write_adapter(tmp_path / "runs" / name, SITES)
    (tmp_path / "runs/log").mkdir()
    expected = r"runs: no adapter, but a folder of 3: \.hidden, chat, sql; give one of them, as /"
    with pytest.raises(AdapterConfigError, match=expected):
        read_adapter(tmp_path / "runs")
    with pytest.raises(AdapterConfigError, match=r"log/adapter_config\.json: no such file"):
        read_adapter(tmp_path / "runs/log")
    for index in range(9):
        write_adapter(tmp_path / f"runs/a{index}", SITES)
    with pytest.raises(AdapterConfigError, match=r"a folder of 12: \.hidden, a0, .*, a6, …; give"):
        read_adapter(tmp_path / "runs")


def test_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("")
    with pytest.raises(AdapterConfigError, match=r"adapter_config\.json: Not a directory"):
        read_adapter(tmp_path / "adapter")


def test_directory_without_weights(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"adapter_model\.safetensors: no such file; a PEFT ada"):
        read_adapter(folder)


def test_digest_covers_config_and_weights(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    digests = {digest_adapter(folder)}
    change_config(folder, lora_alpha=9)
    digests.add(digest_adapter(folder))
    write_adapter(folder, SITES, rank=2, seed=9, alpha=9)
    digests.add(digest_adapter(folder))
    assert len(digests) == 3
