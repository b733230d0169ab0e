"""genai_config.json, by which onnxruntime-genai knows a decoder's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from .files import unreadable

GENAI_CONFIG = "genai_config.json"
_MODEL = {"context_length": int, "vocab_size": int, "eos_token_id": (int, list), "decoder": dict}
_DECODER = {
    "filename": str,
    "inputs": dict,
    "outputs": dict,
    "num_hidden_layers": int,
    "num_key_value_heads": int,
    "head_size": int,
}


def read_genai_config(folder: Path) -> dict[str, Any]:
    """The whole config: `model`, and how it is searched.

    Raises:
        ArtifactError: it is missing, no JSON, or lacks what a decoder is run by.
    """
    file = folder / GENAI_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{file}: {unreadable(error)}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: not JSON: {error}; copy or make the folder again") from error
    _require(file, "", config, {"model": dict, "search": dict})
    _require(file, "model.", config["model"], _MODEL)
    _require(file, "model.decoder.", config["model"]["decoder"], _DECODER)
    return dict(config)


def end_tokens(model: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text; `model`: of the config, which gives one or a list."""
    ends = model["eos_token_id"]
    return list(ends) if isinstance(ends, list) else [ends]


def _require(file: Path, where: str, part: Any, kinds: Mapping[str, Any]) -> None:
    for key, kind in kinds.items():
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            problem = "is missing" if value is None else f"is {value!r}"
            raise ArtifactError(
                f"{file}: {where}{key} {problem}, so no decoder can be run by it; make the folder"
                " again with onnxruntime-genai's model builder"
            )
