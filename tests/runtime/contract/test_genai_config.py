"""A genai_config.json that somebody else wrote: whole, or an error that says what it lacks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.genai import genai_config

import loraexport_runtime as lr
from loraexport_runtime.contract.genai_config import check_cache, end_tokens, read_genai_config
from loraexport_runtime.contract.onnx_file import OnnxFile, TensorType


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


UNKNOWN: dict[str, tuple[str, Any]] = {
    "a library": ("decoder.session_options.custom_ops_library", "/tmp/evil.so"),
    "a library, of run options": ("decoder.run_options", {"custom_ops_library": "evil.so"}),
    "another graph": ("vision", {"filename": "/etc/passwd"}),
    "a pipeline": ("decoder.pipeline", [{"embeddings": {"filename": "../x.onnx"}}]),
    "a file to write": ("decoder.session_options.enable_profiling", "/tmp/profile"),
    "an entry": ("decoder.session_options.session.optimized_model_filepath", "x"),
    "a key of nobody": ("decoder.extra", 1),
    "a library of a provider": (
        "decoder.session_options.provider_options",
        [{"cuda": {"backend_path": "evil.so"}}],
    ),
    "a provider of a library": (
        "decoder.session_options.provider_options",
        [{"qnn": {"backend_path": "evil.so"}}],
    ),
    "more inside a value": ("type", {"custom_ops_library": "evil.so"}),
    "more inside a list": ("decoder.head_size_of", [{"custom_ops_library": "evil.so"}]),
}
"""Where -> a value that makes onnxruntime-genai load a library or another file, or could."""


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_key_that_is_not_known_to_be_harmless(tmp_path: Path, case: str) -> None:
    where, value = UNKNOWN[case]
    config = genai_config()
    first, _, rest = where.partition(".")
    part, key = config["model"], first
    if first == "decoder":
        part, key = part["decoder"], rest
    if rest.startswith("session_options."):
        part = part.setdefault("session_options", {})
        key = rest.removeprefix("session_options.")
    part[key] = value
    with pytest.raises(lr.ArtifactError, match=r"genai_config\.json: .*; remove it, or let onnx"):
        read_genai_config(write(tmp_path, config))


@pytest.mark.parametrize("name", ["/etc/passwd", "../model.onnx", "..", "", "a\\b", "a\0b"])
def test_a_graph_that_lies_elsewhere(tmp_path: Path, name: str) -> None:
    config = genai_config()
    config["model"]["decoder"]["filename"] = name
    with pytest.raises(lr.ArtifactError, match="expected the name of a file in this folder"):
        read_genai_config(write(tmp_path, config))


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("num_hidden_layers", 1, r"num_hidden_layers is 1, and the graph has 2 of 'past_key_"),
        ("num_hidden_layers", 2**40, r"num_hidden_layers is 1099511627776, and the graph has 2"),
        ("num_key_value_heads", 3, r"head_size are 3 and 2, and 'past_.* of the graph is \[None"),
        ("head_size", 1, r"num_key_value_heads and head_size are 2 and 1, and 'past_key"),
        ("inputs", {"past_key_names": "%d"}, r"the graph has 0 of '%d'; the two are not of one"),
        ("outputs", {"present_key_names": "a%d"}, r"is 2, and the graph has 0 of 'a%d'; the two"),
    ],
)
def test_a_cache_that_is_not_the_graphs(tmp_path: Path, key: str, value: Any, text: str) -> None:
    cache = TensorType(1, (None, 2, None, 2))
    graph = OnnxFile(
        {f"past_key_values.{i}.{part}": cache for i in range(2) for part in ("key", "value")},
        {f"present.{i}.{part}": cache for i in range(2) for part in ("key", "value")},
        {},
        {},
        frozenset(),
    )
    model = genai_config()["model"]
    check_cache(model, graph, tmp_path, lr.ArtifactError)
    model["decoder"] |= {key: value}
    with pytest.raises(lr.ArtifactError, match=text):
        check_cache(model, graph, tmp_path, lr.ArtifactError)
