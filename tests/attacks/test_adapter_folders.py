"""Adapters that are pickles, or whose config is broken."""

from pathlib import Path

import numpy as np
import pytest
import torch
from support.peft_adapters import (
    Model,
    adapter,
    save_peft,
)

from loraexport_runtime.adapters.header import read_adapter
from loraexport_runtime.adapters.tensors import read_lora_weights
from loraexport_runtime.errors import AdapterConfigError, WeightsError

torch.set_num_threads(1)


def test_bin_adapter_is_refused_with_a_command_that_converts_it(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    wrapped = save_peft(folder, Model(), r=2, target_modules=["v"])
    expected = read_lora_weights(read_adapter(folder))
    (folder / "adapter_model.safetensors").unlink()
    wrapped.save_pretrained(str(folder), safe_serialization=False)
    with pytest.raises(WeightsError, match=r"\.bin adapter is unpickled.*python -c") as caught:
        read_adapter(folder)

    code = str(caught.value).split('python -c "')[1].removesuffix('"')
    exec(code, {})  # the command of the message, word for word
    converted = read_lora_weights(read_adapter(folder))
    assert converted.keys() == expected.keys()
    for name, lora in converted.items():
        np.testing.assert_array_equal(lora.b, expected[name].b)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("", "the file is empty"),
        ("[" * 100_000, "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ("{}", "peft_type is None; only 'LORA'"),
        ('{"peft_type": "IA3"}', "peft_type is 'IA3'; only 'LORA'"),
        ('{"peft_type": "ADALORA", "r": 8}', "peft_type is 'ADALORA'"),
    ],
    ids=["open", "empty", "deep", "list", "no_type", "ia3", "adalora"],
)
def test_broken_config(tmp_path: Path, text: str, expected: str) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterConfigError, match=rf"adapter_config\.json: {expected}"):
        read_adapter(folder)


def test_config_that_is_not_utf8(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    (folder / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(AdapterConfigError, match="not UTF-8 text"):
        read_adapter(folder)
