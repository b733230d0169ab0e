"""A decoder's config.json -> what its attention does by position: windows, and rotary factors.

All numbers are transformers' own: its config says which layers have a window, and its rotary
module makes the factors of every RoPE type that it knows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .folder import CONFIG, foreign_code
from .model import model_class, read_task_config
from .quiet import quiet_models

_PLAIN_ROPE = "default"
_OF_EVERY_ROPE = ("rope_theta", "partial_rotary_factor")


@dataclass(frozen=True)
class RotaryFactors:
    """cos and sin of every position, float32 [positions, size / 2] each."""

    cos: np.ndarray
    sin: np.ndarray


@dataclass(frozen=True)
class Positions:
    """What a decoder's attention does by position."""

    windows: tuple[int | None, ...]
    """Of each layer: a token sees so many, itself among them; None: all before it."""
    reread_length: int | None
    """A longer text is read with other rotary factors, its first tokens too (longrope)."""
    plain: frozenset[int] = frozenset()
    """The layers without rotary positions."""

    def lengths(self, context: int) -> tuple[int, ...]:
        """The lengths below a context at which the model begins to compute something else."""
        every = {*self.windows, self.reread_length} - {None}
        return tuple(sorted(length for length in every if length is not None and length < context))


def read_positions(directory: Path) -> Positions:
    """Windows and lengths of a decoder.

    Raises:
        BaseModelError: config.json is broken, or no model that transformers knows.
    """
    config = read_task_config(directory, "causal-lm")
    with foreign_code(f"{directory}: {CONFIG} does not fit a model of type {config.model_type!r}"):
        rope = _rope(config.to_dict())
        length = None
        if rope.get("rope_type") == "longrope":
            length = int(rope["original_max_position_embeddings"])
        turned = getattr(config, "no_rope_layers", None) or ()
        plain = frozenset(index for index, is_turned in enumerate(turned) if not is_turned)
        return Positions(_windows(config), length, plain)


def link_plain(directory: Path, folder: Path) -> None:
    """Fill a folder with links to a model's files, and a config.json with RoPE of the plain type in
    every layer.

    For onnxruntime-genai's builder, whose graph gets its positions afterwards.

    Raises:
        BaseModelError: config.json is broken.
    """
    for file in directory.iterdir():
        if file.is_file() and file.name != CONFIG and file.suffix != ".py":
            (folder / file.name).symlink_to(file.resolve())
    values = read_task_config(directory, "causal-lm").to_dict()
    values.pop("auto_map", None)  # code, which is not run
    rope = _rope(values)
    if "rope_type" in rope:  # else each type of layer has its own
        kept = {name: rope[name] for name in _OF_EVERY_ROPE if name in rope}
        values["rope_parameters"] = {**kept, "rope_type": _PLAIN_ROPE}
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = values["max_position_embeddings"]
    if values.get("no_rope_layers"):
        values["no_rope_layers"] = [1] * len(values["no_rope_layers"])
    if "layer_norm_eps" in values:  # onnxruntime-genai's builder knows the other word alone
        values.setdefault("rms_norm_eps", values["layer_norm_eps"])
    (folder / CONFIG).write_text(json.dumps(values), encoding="utf-8")


def _windows(config: Any) -> tuple[int | None, ...]:
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return (None,) * layers
    # A model without layer_types has its window in every layer (Mistral, Phi-3).
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    rope = values.get("rope_parameters")
    return rope if isinstance(rope, dict) else {}


def read_rotary_factors(directory: Path, length: int) -> RotaryFactors | None:
    """The factors of every position of a text of `length` tokens; None for a model without RoPE.

    Raises:
        BaseModelError: config.json is broken.
    """
    config = read_task_config(directory, "causal-lm")
    with (
        foreign_code(f"{directory}: transformers cannot compute its rotary positions"),
        quiet_models(),
        torch.no_grad(),
    ):
        with torch.device("meta"):
            model: Any = model_class(config, "causal-lm").from_config(config)
        classes = [type(module) for module in model.modules() if hasattr(module, "inv_freq")]
        if not classes:
            return None
        # Made anew: what is on the meta device has no values.
        rotary: Any = classes[0](config)
        cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    half = cos.shape[-1] // 2
    return RotaryFactors(cos[0, :, :half].numpy(), sin[0, :, :half].numpy())
