"""Directories of sentence-transformers, and what they should give, by numpy and text by text."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@dataclass(frozen=True)
class Module:
    """A module behind the transformer: its class, its config, its weights."""

    kind: str
    config: Mapping[str, Any] | None = None
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)


def pooling(width: int, mode: Any, **config: Any) -> Module:
    """As 5.4 and later save it."""
    return Module("Pooling", {"embedding_dimension": width, "pooling_mode": mode, **config})


def dense(
    size_in: int,
    size_out: int,
    activation: str | None = "torch.nn.modules.activation.Tanh",
    bias: bool = True,
    residual: bool = False,
) -> Module:
    generator = np.random.default_rng(size_in + size_out)
    tensors = {"linear.weight": generator.standard_normal((size_out, size_in)) / 4}
    if bias:
        tensors["linear.bias"] = generator.standard_normal(size_out)
    if residual and size_in != size_out:
        tensors["residual.weight"] = generator.standard_normal((size_out, size_in)) / 4
    config = {"in_features": size_in, "out_features": size_out, "bias": bias}
    config |= {"use_residual": True} if residual else {}
    config |= {"activation_function": activation} if activation else {}
    single = {name: array.astype(np.float32) for name, array in tensors.items()}
    return Module("Dense", config, single)


def layer_norm(width: int) -> Module:
    generator = np.random.default_rng(width)
    names = ("norm.weight", "norm.bias")
    tensors = {name: generator.standard_normal(width).astype(np.float32) for name in names}
    return Module("LayerNorm", {"dimension": width}, tensors)


NORMALIZE = Module("Normalize")
DROPOUT = Module("Dropout", {"dropout": 0.2})


def declare(folder: Path, *modules: Module, transformer: str = "", **config: Any) -> Path:
    """Write modules.json and its modules' folders; `config`: config_sentence_transformers.json.

    Args:
        transformer: the folder that the model itself is in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [transformer, *(f"{index}_{one.kind}" for index, one in enumerate(modules, 1))]
    kinds = ["Transformer", *(one.kind for one in modules)]
    listed = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.x.{kind}"}
        for index, (path, kind) in enumerate(zip(paths, kinds, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    for path, module in zip(paths[1:], modules, strict=True):
        (folder / path).mkdir(exist_ok=True)
        if module.config is not None:
            (folder / path / "config.json").write_text(json.dumps(module.config))
        if module.tensors:
            save_file(dict(module.tensors), folder / path / "model.safetensors")
    if config:
        (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    return folder


def pool(text: np.ndarray, mode: str, prompt: int = 0) -> np.ndarray:
    """The vector of one text [tokens, n], float64; the first `prompt` tokens are not pooled."""
    kept = text[prompt:].astype(np.float64)
    weights = np.arange(prompt + 1, len(text) + 1)[:, None]
    by_mode: dict[str, Callable[[], np.ndarray]] = {
        "cls": lambda: kept[0],
        "lasttoken": lambda: kept[-1],
        "max": lambda: kept.max(0),
        "mean": lambda: kept.sum(0) / len(kept),
        "mean_sqrt_len_tokens": lambda: kept.sum(0) / np.sqrt(len(kept)),
        "weightedmean": lambda: (kept * weights).sum(0) / weights.sum(),
    }
    return by_mode[mode]()


def follow(vector: np.ndarray, modules: Sequence[Module], activation: Any = np.tanh) -> np.ndarray:
    """The vector behind these modules, float64."""
    for module in modules:
        weights = {name: tensor.astype(np.float64) for name, tensor in module.tensors.items()}
        if module.kind == "Dense":
            y = activation(weights["linear.weight"] @ vector + weights.get("linear.bias", 0))
            if dict(module.config or {}).get("use_residual"):
                y = y + weights.get("residual.weight", np.eye(len(y))) @ vector
            vector = y
        elif module.kind == "LayerNorm":
            centred = vector - vector.mean()
            scaled = centred / np.sqrt((centred**2).mean() + 1e-5)
            vector = weights["norm.weight"] * scaled + weights["norm.bias"]
        elif module.kind == "Normalize":
            vector = vector / np.sqrt((vector**2).sum())
    return vector
