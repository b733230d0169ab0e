"""Tiny random models of every family."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import yaml
from peft import LoraConfig, get_peft_model

from loraexport.hf.quiet import quiet_models

VOCABULARY = 60
WINDOW = 4

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}
DECODER: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROBERTA: dict[str, Any] = {**_SIZES, "type_vocab_size": 1, "pad_token_id": 1}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "patch_size": 4,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": 8,
}

_ENCODER_SITES = (["query", "value"], ["key", "output.dense"])
DECODER_SITES = (["q_proj", "v_proj"], ["k_proj", "o_proj", "down_proj"])

FEATURES = "feature-extraction"
CAUSAL = "causal-lm"
IMAGE_CLASSES = "image-classification"
IMAGE_EMBEDDING = "image-embedding"


@dataclass(frozen=True)
class Family:
    """A tiny model of a family, where its two adapters apply, and what is proven of it."""

    config: Callable[[], Any]
    sites: tuple[list[str], list[str]]
    """target_modules of the first adapter (rank 2) and of the second (rank 4, rsLoRA)."""
    tasks: tuple[str, ...] = (FEATURES,)
    notes: str = ""
    window: int = 0
    """Tokens of a sliding window; 0 for none."""


FAMILIES: dict[str, Family] = {
    "BERT": Family(
        lambda: tf.BertConfig(**_SIZES),
        _ENCODER_SITES,
        (FEATURES, "sentence-embedding", "sequence-classification", "token-classification"),
        "pooling by mean, first token or maximum",
    ),
    "RoBERTa": Family(
        lambda: tf.RobertaConfig(**ROBERTA), _ENCODER_SITES, notes="positions from the padding id"
    ),
    "DistilBERT": Family(
        lambda: tf.DistilBertConfig(
            vocab_size=VOCABULARY,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
        ),
        (["q_lin", "lin1"], ["v_lin", "out_lin"]),
    ),
    "XLM-R": Family(
        lambda: tf.XLMRobertaConfig(**ROBERTA),
        _ENCODER_SITES,
        notes="positions from the padding id",
    ),
    "GPT-2": Family(
        lambda: tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        ),
        (["c_attn"], ["c_proj", "c_fc"]),
        (FEATURES, CAUSAL),
        "Conv1D sites (fan_in_fan_out); `lm_head` as a site beside tied embeddings",
    ),
    "Llama": Family(
        lambda: tf.LlamaConfig(**DECODER),
        DECODER_SITES,
        (FEATURES, CAUSAL, "sequence-classification"),
        "`lm_head` as a site, tied or not",
    ),
    "Mistral": Family(
        lambda: tf.MistralConfig(**DECODER, sliding_window=WINDOW),
        DECODER_SITES,
        (FEATURES, CAUSAL),
        "past its sliding window",
        WINDOW,
    ),
    "Qwen2": Family(lambda: tf.Qwen2Config(**DECODER), DECODER_SITES, (FEATURES, CAUSAL)),
    "Qwen3": Family(
        lambda: tf.Qwen3Config(**DECODER, head_dim=8), DECODER_SITES, (FEATURES, CAUSAL)
    ),
    "Gemma 3 (text)": Family(
        lambda: tf.Gemma3TextConfig(
            **DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        ),
        DECODER_SITES,
        (FEATURES, CAUSAL),
        "past its sliding window",
        WINDOW,
    ),
    "Phi-3": Family(
        lambda: tf.Phi3Config(**DECODER),
        (["qkv_proj", "down_proj"], ["gate_up_proj", "o_proj"]),
        (FEATURES, CAUSAL),
        "fused `qkv_proj` and `gate_up_proj`; longrope past its first length",
    ),
    "GPT-NeoX": Family(
        lambda: tf.GPTNeoXConfig(**_SIZES, bos_token_id=1, eos_token_id=2),
        (["query_key_value"], ["dense", "dense_4h_to_h"]),
    ),
    "ModernBERT": Family(
        lambda: tf.ModernBertConfig(
            **_SIZES,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            cls_token_id=1,
            sep_token_id=2,
            local_attention=WINDOW,
            global_attn_every_n_layers=2,
        ),
        (["Wqkv"], ["Wo", "Wi"]),
        notes="past its local window",
        window=WINDOW,
    ),
    "MPNet": Family(
        lambda: tf.MPNetConfig(**_SIZES), (["q"], ["k", "dense"]), notes="eager attention"
    ),
    "DeBERTa-v2": Family(
        lambda: tf.DebertaV2Config(**_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"]),
        (["query_proj"], ["value_proj", "dense"]),
        notes="eager attention, relative positions",
    ),
    "T5 (encoder)": Family(
        lambda: tf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        ),
        (["q", "v"], ["k", "wo"]),
        notes="of a whole T5 checkpoint",
    ),
    "ViT": Family(
        lambda: tf.ViTConfig(**_VISION, image_size=[8, 12], num_labels=5),
        (["q_proj", "fc1", "classifier"], ["v_proj", "o_proj", "fc2"]),
        (FEATURES, IMAGE_CLASSES),
        "`pixel_values` of the config's size",
    ),
    "CLIP (vision)": Family(
        lambda: tf.CLIPConfig(
            text_config={**_SIZES, "bos_token_id": 1, "eos_token_id": 2},
            vision_config={**_VISION, "image_size": 12, "projection_dim": 24, "num_channels": 1},
            projection_dim=24,
        ),
        (["q_proj", "fc1", "visual_projection"], ["v_proj", "out_proj", "fc2"]),
        (FEATURES, IMAGE_EMBEDDING),
        "the vision tower, of a whole CLIP checkpoint or its own; embeddings as Hugging Face gives"
        " them, not normalised",
    ),
}

CLASSES: dict[str, Any] = {
    FEATURES: tf.AutoModel,
    "sentence-embedding": tf.AutoModel,
    "sequence-classification": tf.AutoModelForSequenceClassification,
    "token-classification": tf.AutoModelForTokenClassification,
    CAUSAL: tf.AutoModelForCausalLM,
    IMAGE_CLASSES: tf.AutoModelForImageClassification,
}
_OF_WHOLE = {"t5": tf.T5Model, "clip": tf.CLIPModel}
"""Checkpoints of which a task needs a part."""
PARTS: dict[tuple[str, str], Any] = {
    ("t5", FEATURES): tf.T5EncoderModel,
    ("clip", FEATURES): tf.CLIPVisionModel,
    ("clip", IMAGE_EMBEDDING): tf.CLIPVisionModelWithProjection,
}


def load_base(task: str, folder: Path) -> Any:
    config = tf.AutoConfig.from_pretrained(folder / "base")
    chosen = PARTS.get((config.model_type, task)) or CLASSES[task]
    return chosen.from_pretrained(folder / "base").eval()


def write_model(family: Family, task: str, folder: Path) -> None:
    """A random model, and two adapters with random A and B that PEFT made on it."""
    torch.manual_seed(0)
    config = family.config()
    make = _OF_WHOLE.get(config.model_type) or CLASSES[task].from_config
    make(config).float().save_pretrained(folder / "base")
    for index, name in enumerate(("first", "second")):
        lora = LoraConfig(
            r=(2, 4)[index],
            lora_alpha=6,
            use_rslora=index == 1,
            target_modules=family.sites[index],
            init_lora_weights=False,
            fan_in_fan_out=config.model_type == "gpt2",
        )
        torch.manual_seed(1 + index)
        with quiet_models():
            get_peft_model(load_base(task, folder), lora).save_pretrained(folder / name)


def write_spec(task: str, folder: Path, *formats: str, **export: Any) -> None:
    data = {
        "version": 1,
        "name": "tiny",
        "base": {"kind": "transformers", "path": "base", "task": task},
        "adapters": [{"name": name, "path": name} for name in ("first", "second")],
        "export": {"formats": list(formats or ("onnx", "torchscript")), **export},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(data))
