"""A small model with names that patterns can confuse, and adapters that PEFT saves of it."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from support.adapters import write_adapter

SITES = {"blocks.0.q": (8, 8), "blocks.1.v": (8, 4)}
FACTOR = "base_model.model.blocks.0.q.lora_"


def adapter(folder: Path, **config: Any) -> Path:
    return write_adapter(folder / "adapter", SITES, rank=2, config=config)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.v = nn.Linear(8, 4)
        self.qv = nn.Linear(8, 8)


class Model(nn.Module):
    """Names that patterns can confuse: q and qv, layers.1 and layers.10, inner and outer q."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block() for _ in range(11))


def save_peft(folder: Path, model: nn.Module, **config: Any) -> peft.PeftModel:
    """Apply a LoraConfig, give every factor random values, save; PEFT's own way."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    randomise(wrapped)
    wrapped.save_pretrained(str(folder))
    return wrapped


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn_like(value) * 0.3)


def peft_layers(model: peft.PeftModel) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def change_config(folder: Path, **fields: object) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=20, num_hidden_layers=1, tie_word_embeddings=False, **sizes)
    return LlamaForCausalLM(config)


def save_llama(folder: Path, targets: list[str], *, save_embedding_layers: bool) -> Any:
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        wrapped = peft.get_peft_model(tiny_llama(), config)
    randomise(wrapped)
    wrapped.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
    return wrapped
