"""Decoders whose adapters bring more than A and B of linear layers, each as PEFT trains it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from loraexport.hf.quiet import quiet_models
from support.builds import Project
from support.decoders import EOS, FAMILIES, load_base, write_base

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "o_proj"], "r": 4},
    "dora": {"target_modules": ["q_proj", "v_proj", "down_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["k_proj", "o_proj"], "lora_bias": True},
    "lora_only": {"target_modules": ["q_proj", "v_proj", "o_proj"], "bias": "lora_only"},
    "all_three": {
        "target_modules": ["v_proj", "up_proj", "k_proj"],
        "use_dora": True,
        "use_rslora": True,
        "bias": "lora_only",
    },
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "dora_ends": {"target_modules": ["embed_tokens", "lm_head", "k_proj"], "use_dora": True},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved_table": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_both": {
        "target_modules": ["v_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "biased_head": {"target_modules": ["lm_head", "o_proj"], "lora_bias": True},
    "saved_product": {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]},
}
"""Name -> what LoraConfig gets."""


def write_adapter(project: Path, name: str, folder: Path) -> None:
    """An adapter of that name for a project's base, in which no tensor is zero."""
    config = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | FEATURES[name]
    with quiet_models():
        wrapped: Any = get_peft_model(load_base(project), LoraConfig(**config))
        randomise(wrapped, list(FEATURES).index(name))
        wrapped.save_pretrained(folder, save_embedding_layers=False)


def write_features(
    folder: Path, family: str, names: Sequence[str], more: Sequence[str] = (), **changes: Any
) -> Path:
    """A base, the adapters of a spec, and more beside them; the spec's path."""
    write_base(folder, FAMILIES[family])
    for name in (*names, *more):
        write_adapter(folder, name, folder / name)
    data: dict[str, Any] = {
        "base": {"kind": "causal_lm", "path": "base"},
        "adapters": [{"name": name, "path": name} for name in names],
    }
    return Project(folder).spec(**(data | changes))


def randomise(model: Any, seed: int) -> None:
    """Random values for whatever PEFT trains; magnitudes stay near what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


class Alone:
    """transformers and PEFT with one adapter, or none: one prompt at a time."""

    def __init__(self, folder: Path, name: str | None, scale: float = 1.0) -> None:
        model: Any = load_base(folder)
        if name is not None:
            with quiet_models():
                model = PeftModel.from_pretrained(model, folder / name).eval()
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.scaling["default"] *= scale
        self._model = model

    def generate(self, prompt: Sequence[int], steps: int) -> tuple[int, ...]:
        """The likeliest tokens, without the end-of-text token."""
        ids = torch.tensor([list(prompt)])
        with torch.no_grad(), quiet_models():
            found = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=tf.GenerationConfig(
                    max_new_tokens=steps, do_sample=False, eos_token_id=EOS, pad_token_id=0
                ),
            )
        tokens = found[0, len(prompt) :].tolist()
        return tuple(tokens[: tokens.index(EOS)] if EOS in tokens else tokens)
