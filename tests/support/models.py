"""Tiny random bases."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HIDDEN = 32


def write_base(folder: Path, tensors: Mapping[str, np.ndarray] | None = None) -> Path:
    """A Hugging Face directory with one safetensors file of two blocks' projections."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1)
    if tensors is None:
        sizes = {"q": 32, "k": 16, "v": 16, "up": 48}
        made: dict[str, np.ndarray] = {}
        for block in range(2):
            for name, out in sizes.items():
                weight = generator.standard_normal((out, HIDDEN)) / np.sqrt(HIDDEN)
                made[f"blocks.{block}.{name}.weight"] = weight.astype(np.float32)
                if name != "up":
                    made[f"blocks.{block}.{name}.bias"] = generator.standard_normal(out).astype(
                        np.float32
                    )
        made["words.weight"] = generator.standard_normal((40, HIDDEN)).astype(np.float32)
        tensors = made
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_bert(folder: Path) -> Path:
    """A tiny BERT with random weights, as save_pretrained writes it."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    model = BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder
