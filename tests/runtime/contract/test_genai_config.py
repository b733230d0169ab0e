"""A genai_config.json that somebody else wrote: whole, or an error that says what it lacks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import loraexport_runtime as lr
from loraexport_runtime.contract.genai_config import end_tokens, read_genai_config


def whole() -> dict[str, Any]:
    sizes = dict.fromkeys(("num_hidden_layers", "num_key_value_heads", "head_size"), 2)
    decoder = {"filename": "model.onnx", "inputs": {}, "outputs": {}, **sizes}
    model = {"context_length": 128, "vocab_size": 320, "eos_token_id": [2, 3], "decoder": decoder}
    return {"model": model, "search": {}}


def write(folder: Path, config: object) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "genai_config.json").write_text(text)
    return folder


def test_a_whole_one(tmp_path: Path) -> None:
    config = read_genai_config(write(tmp_path, whole()))
    assert config == whole()
    assert end_tokens(config["model"]) == [2, 3]
    assert end_tokens({"eos_token_id": 2}) == [2]


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON: Expecting property name"),
    "empty": ("", "not JSON: Expecting value"),
    "deep": ("[" * 100_000, "not JSON: "),
    "a list": ([], "model is missing, so no decoder can be run by it"),
    "model is a text": ({"model": "x", "search": {}}, "model is 'x', so no decoder"),
    "no search": ({"model": {}}, "search is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one(tmp_path: Path, case: str) -> None:
    config, text = BROKEN[case]
    where = re.escape(f"{tmp_path}/genai_config.json: {text}")
    with pytest.raises(lr.ArtifactError, match=where):
        read_genai_config(write(tmp_path, config))


@pytest.mark.parametrize("value", [None, True, 1.5, {}])
@pytest.mark.parametrize("key", ["context_length", "vocab_size", "eos_token_id"])
def test_a_number_of_the_model(tmp_path: Path, key: str, value: Any) -> None:
    config = whole()
    config["model"][key] = value
    problem = "is missing" if value is None else f"is {value!r}"
    with pytest.raises(lr.ArtifactError, match=re.escape(f"json: model.{key} {problem}, so no")):
        read_genai_config(write(tmp_path, config))


@pytest.mark.parametrize("key", ["filename", "inputs", "outputs", "head_size"])
def test_a_part_of_the_decoder(tmp_path: Path, key: str) -> None:
    config = whole()
    del config["model"]["decoder"][key]
    with pytest.raises(lr.ArtifactError, match=rf"json: model\.decoder\.{key} is missing, so no"):
        read_genai_config(write(tmp_path, config))
