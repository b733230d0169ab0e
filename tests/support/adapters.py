"""PEFT directories with random A and B."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def write_adapter(
    folder: Path,
    sites: Mapping[str, tuple[int, int]],
    *,
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    embeddings: tuple[str, ...] = (),
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """A PEFT directory with random A and B.

    Args:
        sites: module -> (in, out).
        config: fields that replace or extend the config.
        tensors: tensors that replace or extend the file; None removes one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    rank_of = dict((config or {}).get("rank_pattern", {}))
    made: dict[str, np.ndarray] = {}
    for site, (size_in, size_out) in sites.items():
        r = next((value for key, value in rank_of.items() if site.endswith(key)), rank)
        a = generator.standard_normal((r, size_in)).astype(np.float32) / np.sqrt(size_in)
        b = generator.standard_normal((size_out, r)).astype(np.float32) * 0.3
        prefix = f"base_model.model.{site}.lora_"
        names = ("embedding_A", "embedding_B") if site in embeddings else ("A.weight", "B.weight")
        made[prefix + names[0]] = a.astype(np.float32)
        made[prefix + names[1]] = b.astype(np.float32)
    for name, tensor in (tensors or {}).items():
        if tensor is None:
            del made[name]
        else:
            made[name] = tensor
    save_file(made, folder / "adapter_model.safetensors")
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({site.rsplit(".", 1)[-1] for site in sites}),
        "bias": "none",
        "init_lora_weights": True,
    }
    fields.update(config or {})
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder
