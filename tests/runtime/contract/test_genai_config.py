"""A genai_config.json that somebody else wrote: whole, or an error that says what it lacks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.genai import genai_config

import loraexport_runtime as lr
from loraexport_runtime.contract.genai_config import end_tokens, read_genai_config


def write(folder: Path, config: object) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (folder / "genai_config.json").write_text(text)
    return folder


def test_a_whole_one(tmp_path: Path) -> None:
    config = read_genai_config(write(tmp_path, genai_config()))
    assert config == genai_config()
    assert end_tokens(config["model"]) == [2, 3]
    assert end_tokens({"eos_token_id": 2}) == [2]


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not JSON: Expecting property name"),
    "empty": ("", "the file is empty; copy or download it again"),
    "deep": ("[" * 100_000, "not JSON: "),
    "a list": ([], "expected an object, got a list"),
    "model is a text": ({"model": "x", "search": {}}, "model: expected an object, got 'x'"),
    "no search": ({"model": {}}, "key 'search' is missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_one(tmp_path: Path, case: str) -> None:
    config, text = BROKEN[case]
    where = re.escape(f"{tmp_path}/genai_config.json: {text}")
    with pytest.raises(lr.ArtifactError, match=where):
        read_genai_config(write(tmp_path, config))


@pytest.mark.parametrize("value", [None, True, 1.5, {}])
@pytest.mark.parametrize("key", ["context_length", "vocab_size"])
def test_a_number_of_the_model(tmp_path: Path, key: str, value: Any) -> None:
    text = rf"json: {key}: expected an integer, got .+; copy or download it again$"
    with pytest.raises(lr.ArtifactError, match=text):
        read_genai_config(write(tmp_path, genai_config(**{key: value})))


@pytest.mark.parametrize("value", [None, True, 1.5, {}, [], [2, None]])
def test_tokens_that_end_a_text(tmp_path: Path, value: Any) -> None:
    text = r"json: model\.eos_token_id: expected one token or several, got "
    with pytest.raises(lr.ArtifactError, match=text):
        read_genai_config(write(tmp_path, genai_config(eos_token_id=value)))


def test_a_size_below_one(tmp_path: Path) -> None:
    with pytest.raises(lr.ArtifactError, match=r"json: model\.vocab_size: expected a positive"):
        read_genai_config(write(tmp_path, genai_config(vocab_size=0)))


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ("filename", "filename"),
        ("inputs", "inputs.past_key_names"),
        ("outputs", "outputs.present_key_names"),
        ("head_size", "head_size"),
    ],
)
def test_a_part_of_the_decoder(tmp_path: Path, key: str, missing: str) -> None:
    config = genai_config()
    del config["model"]["decoder"][key]
    text = re.escape(f"json: key 'decoder.{missing}' is missing; copy or download it again")
    with pytest.raises(lr.ArtifactError, match=text):
        read_genai_config(write(tmp_path, config))
