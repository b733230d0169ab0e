"""genai_config.json, by which onnxruntime-genai knows a decoder's folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GENAI_CONFIG = "genai_config.json"


def read_genai_config(folder: Path) -> dict[str, Any]:
    """The whole config: `model`, and how it is searched."""
    config: dict[str, Any] = json.loads((folder / GENAI_CONFIG).read_text(encoding="utf-8"))
    return config


def end_tokens(model: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text; `model`: of the config, which gives one or a list."""
    ends = model["eos_token_id"]
    return list(ends) if isinstance(ends, list) else [ends]
