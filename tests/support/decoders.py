"""Tiny random decoders of every family that generates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loraexport.hf.quiet import quiet_models
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.generation.generator import TextGenerator
from support.builds import Project

CPU: list[tuple[str, dict[str, Any]]] = [("CPUExecutionProvider", {})]
VOCABULARY, CONTEXT = 320, 128
PAD, BOS, EOS = 0, 1, 2
ADAPTERS = ("first", "second")
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_SITES = (["q_proj", "v_proj"], ["k_proj", "o_proj", "down_proj"])


@dataclass(frozen=True)
class Family:
    """A tiny decoder of a family, and where its two adapters apply."""

    config: Callable[[], Any]
    sites: tuple[list[str], list[str]] = _SITES
    """target_modules of the first adapter (rank 4) and of the second (rank 8, rsLoRA)."""
    notes: str = ""


FAMILIES: dict[str, Family] = {
    "Llama": Family(
        lambda: tf.LlamaConfig(**SIZES),
        (["q_proj", "v_proj"], ["k_proj", "o_proj", "gate_proj", "down_proj"]),
    ),
    "Mistral": Family(
        lambda: tf.MistralConfig(**SIZES, sliding_window=None), notes="without a sliding window"
    ),
    "Qwen2": Family(
        lambda: tf.Qwen2Config(**SIZES),
        (["q_proj", "v_proj"], ["k_proj", "up_proj", "lm_head"]),
        "biases of q, k and v; `lm_head` as a site",
    ),
    "Qwen3": Family(lambda: tf.Qwen3Config(**SIZES, head_dim=16), notes="norms of q and k"),
    "Gemma": Family(lambda: tf.GemmaConfig(**SIZES, head_dim=16), notes="tied embeddings"),
    "Phi-3": Family(
        lambda: tf.Phi3Config(**SIZES, original_max_position_embeddings=CONTEXT),
        (["qkv_proj", "down_proj"], ["gate_up_proj", "o_proj"]),
        "fused `qkv_proj` and `gate_up_proj`",
    ),
    "SmolLM3": Family(
        lambda: tf.SmolLM3Config(**SIZES, no_rope_layers=[1, 1]), notes="with RoPE in every layer"
    ),
    "Granite": Family(
        lambda: tf.GraniteConfig(
            **SIZES,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
            attention_multiplier=0.3,
        ),
        notes="its four multipliers",
    ),
}


def write_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world the adapters of a batch"] * 3, trainer)
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)


def write_decoder(folder: Path, family: Family, **changes: Any) -> Path:
    """A base, two adapters with random A and B, and a spec; its path."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(family.config()).float()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for index, name in enumerate(ADAPTERS):
        lora = LoraConfig(
            r=(4, 8)[index],
            lora_alpha=8,
            use_rslora=index == 1,
            target_modules=family.sites[index],
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(1 + index)
        with quiet_models():
            wrapped: Any = get_peft_model(_load_base(folder), lora)
        for parameter_name, parameter in wrapped.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.3)
        with quiet_models():
            wrapped.save_pretrained(folder / name, save_embedding_layers=False)
    data = {
        "base": {"kind": "causal_lm", "path": "base"},
        "adapters": [{"name": name, "path": name} for name in ADAPTERS],
    }
    return Project(folder).spec(**(data | changes))


def write_family(folder: Path, name: str, **changes: Any) -> Path:
    """The same, of a family by its name."""
    return write_decoder(folder, FAMILIES[name], **changes)


def _load_base(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def make_prompts(*lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(5)
    return [generator.integers(3, VOCABULARY, length).tolist() for length in lengths]


class Peft:
    """transformers and PEFT: one prompt at a time, unpadded, one adapter."""

    def __init__(self, folder: Path) -> None:
        with quiet_models():
            model: Any = PeftModel.from_pretrained(
                _load_base(folder), folder / ADAPTERS[0], ADAPTERS[0]
            )
            model.load_adapter(folder / ADAPTERS[1], ADAPTERS[1])
        self._model = model.eval()

    def generate(self, prompt: Sequence[int], adapter: str | None, steps: int) -> tuple[int, ...]:
        """The likeliest tokens, without the end-of-text token."""
        ids = torch.tensor([list(prompt)])
        options: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": steps,
            "do_sample": False,
        }
        with torch.no_grad(), quiet_models():
            if adapter is None:
                with self._model.disable_adapter():
                    found = self._model.generate(**options)
            else:
                self._model.set_adapter(adapter)
                found = self._model.generate(**options)
        tokens = found[0, len(prompt) :].tolist()
        return tuple(tokens[: tokens.index(EOS)] if EOS in tokens else tokens)


def open_driven(artifact: Path) -> TextGenerator:
    """The engine that captures CUDA graphs, on the CPU without them."""
    manifest = Manifest.read(artifact)
    assert isinstance(manifest.kind, Decoder)
    return TextGenerator(artifact, manifest, manifest.kind, CPU, cuda_graphs=True)
