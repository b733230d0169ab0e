"""genai_config.json, by which onnxruntime-genai knows a decoder's folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, LoraexportError
from .foreign import read_object, value_of

GENAI_CONFIG = "genai_config.json"
_SIZES = (
    "vocab_size",
    "context_length",
    "decoder.head_size",
    "decoder.num_attention_heads",
    "decoder.num_key_value_heads",
    "decoder.num_hidden_layers",
)
_NAMES = tuple(
    f"decoder.{key}"
    for part in ("key", "value")
    for key in (f"inputs.past_{part}_names", f"outputs.present_{part}_names")
)


def read_genai_config(folder: Path, error: type[LoraexportError] = ArtifactError) -> dict[str, Any]:
    """The whole config, `model` and how it is searched, with all that this project reads of it.

    Raises:
        error: the file is missing or damaged, or a value is missing or of another type.
    """
    file = folder / GENAI_CONFIG
    config = read_object(file, error)
    value_of(config, "search", dict, file, error)
    model = value_of(config, "model", dict, file, error)
    for key in _SIZES:
        if value_of(model, key, int, file, error) < 1:
            raise error(f"{file}: model.{key}: expected a positive integer; download it again")
    value_of(model, "decoder.filename", str, file, error)
    for key in _NAMES:
        if "%d" not in value_of(model, key, str, file, error):
            raise error(f"{file}: model.{key}: expected a name with %d; download it again")
    for key in ("inputs", "outputs"):
        for name in value_of(model, f"decoder.{key}", dict, file, error):
            value_of(model["decoder"][key], name, str, file, error)
    if "session_options" in model["decoder"]:
        value_of(model, "decoder.session_options", dict, file, error)
    ends = model.get("eos_token_id")
    if not (_are_tokens(ends) if isinstance(ends, list) else _are_tokens([ends])):
        raise error(f"{file}: model.eos_token_id: expected one token or several, got {ends!r}")
    for key in ("bos_token_id", "pad_token_id"):
        if model.get(key) is not None:
            value_of(model, key, int, file, error)
    return config


def end_tokens(model: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text; `model`: of the config, which gives one or a list."""
    ends = model["eos_token_id"]
    return list(ends) if isinstance(ends, list) else [ends]


def _are_tokens(values: list[Any]) -> bool:
    return bool(values) and all(type(value) is int for value in values)
