"""Tiny random models of every family."""

import json
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
_AUDIO: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
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
SENTENCES = "sentence-embedding"
CAUSAL = "causal-lm"
IMAGE_CLASSES = "image-classification"
IMAGE_EMBEDDING = "image-embedding"
TEXT_EMBEDDING = "text-embedding"
AUDIO_EMBEDDING = "audio-embedding"


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
        (FEATURES, SENTENCES, "sequence-classification", "token-classification"),
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
        (FEATURES, SENTENCES, CAUSAL),
        "past its sliding window",
        WINDOW,
    ),
    "Qwen2": Family(
        lambda: tf.Qwen2Config(**DECODER), DECODER_SITES, (FEATURES, SENTENCES, CAUSAL)
    ),
    "Qwen3": Family(
        lambda: tf.Qwen3Config(**DECODER, head_dim=8),
        DECODER_SITES,
        (FEATURES, SENTENCES, CAUSAL),
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
    "EmbeddingGemma": Family(
        lambda: tf.Gemma3TextConfig(
            **DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=2 * WINDOW,
            layer_types=["sliding_attention", "full_attention"],
            use_bidirectional_attention=True,
        ),
        DECODER_SITES,
        (FEATURES, SENTENCES),
        "Gemma 3 that looks ahead, past its window; with a pair of Dense behind its mean, as"
        " published",
        WINDOW + 1,
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
    "OPT": Family(
        lambda: tf.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            init_std=0.3,
        ),
        (["q_proj"], ["fc2"]),
        notes="layers that get the tokens of all rows as one list",
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
    "DeBERTa-v3": Family(
        lambda: tf.DebertaV2Config(
            **_SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_buckets=8,
            max_relative_positions=-1,
            position_biased_input=False,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
        ),
        (["query_proj", "value_proj"], ["query_proj", "key_proj", "value_proj", "dense"]),
        (FEATURES, "sequence-classification", "token-classification"),
        "as published: positions through the projections of the texts (share_att_key), PEFT's"
        " default targets; of a sequence classifier adapters bring the pooler that its checkpoint"
        " lacks",
    ),
    "T5 (encoder)": Family(
        lambda: tf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4
        ),
        (["q", "v"], ["k", "wo"]),
        tasks=(FEATURES, SENTENCES),
        notes="of a whole T5 checkpoint",
    ),
    "ViT": Family(
        lambda: tf.ViTConfig(**_VISION, image_size=[8, 12], num_labels=5),
        (["q_proj", "fc1", "classifier"], ["v_proj", "o_proj", "fc2"]),
        (FEATURES, IMAGE_CLASSES),
        "`pixel_values` of the config's size",
    ),
    "CLIP (vision)": Family(
        lambda: _clip(),
        (["q_proj", "fc1", "visual_projection"], ["v_proj", "out_proj", "fc2"]),
        (FEATURES, IMAGE_EMBEDDING),
        "the vision tower, of a whole CLIP checkpoint or its own; embeddings as Hugging Face gives"
        " them, not normalised",
    ),
    "CLIP (text)": Family(
        lambda: _clip(),
        (["q_proj", "fc1", "text_projection"], ["v_proj", "out_proj", "fc2"]),
        (TEXT_EMBEDDING,),
        "the text tower of a whole CLIP checkpoint; embeddings are not normalised",
    ),
    "SigLIP (vision)": Family(
        lambda: _siglip(),
        (["q_proj", "fc1"], ["v_proj", "encoder.layers.0.self_attn.out_proj", "fc2"]),
        (FEATURES, IMAGE_EMBEDDING),
        "the vision tower, of a whole SigLIP checkpoint or its own, with its attention pooling;"
        " embeddings are not normalised",
    ),
    "SigLIP (text)": Family(
        lambda: _siglip(),
        (["q_proj", "fc1", "head"], ["v_proj", "out_proj", "fc2"]),
        (TEXT_EMBEDDING,),
        "the text tower of a whole SigLIP checkpoint, which takes the last column, padding or not:"
        " pad as it was trained, to its full length",
    ),
    "LayoutLM": Family(
        lambda: tf.LayoutLMConfig(**_SIZES, max_2d_position_embeddings=40),
        _ENCODER_SITES,
        (FEATURES, "token-classification"),
        "`bbox` int64 [batch, sequence, 4]",
    ),
    "LayoutLMv3": Family(
        lambda: tf.LayoutLMv3Config(
            **_SIZES,
            max_2d_position_embeddings=40,
            coordinate_size=6,
            shape_size=4,
            input_size=8,
            patch_size=4,
            pad_token_id=1,
        ),
        (["query", "value", "word_embeddings"], ["key", "output.dense"]),
        (FEATURES, "token-classification"),
        "`bbox`, and `pixel_values` of the config's size; hidden states of the tokens, then of the"
        " picture's patches",
    ),
    "wav2vec 2.0": Family(
        lambda: tf.Wav2Vec2Config(
            **_AUDIO,
            conv_dim=(16, 16, 16),
            conv_kernel=(6, 3, 2),
            conv_stride=(3, 2, 2),
            num_feat_extract_layers=3,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            conv_bias=True,
        ),
        (["q_proj", "v_proj", "projection"], ["k_proj", "out_proj", "output_dense"]),
        (FEATURES,),
        "`input_values` [batch, samples] and `attention_mask` of samples, padded on the right",
    ),
    "Whisper (encoder)": Family(
        lambda: tf.WhisperConfig(
            vocab_size=VOCABULARY,
            num_mel_bins=6,
            d_model=32,
            encoder_layers=2,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=9,
            max_target_positions=16,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            init_std=0.3,
        ),
        (["q_proj", "fc1"], ["v_proj", "out_proj", "fc2"]),
        (FEATURES,),
        "the encoder of a whole Whisper checkpoint; `input_features` of the config's size",
    ),
    "CLAP (audio)": Family(
        lambda: _clap(),
        (["query", "audio_projection.linear1"], ["value", "output.dense", "reduction"]),
        (FEATURES, AUDIO_EMBEDDING),
        "the audio tower of a whole CLAP checkpoint without fusion; `input_features` of the"
        " processor's size; embeddings are not normalised",
    ),
}


def _clip() -> Any:
    return tf.CLIPConfig(
        text_config={
            **_SIZES,
            "bos_token_id": 1,
            "eos_token_id": 59,
            "projection_dim": 24,
            "pad_token_id": 0,
        },
        vision_config={**_VISION, "image_size": 12, "projection_dim": 24, "num_channels": 1},
        projection_dim=24,
    )


def _siglip() -> Any:
    return tf.SiglipConfig(
        text_config={**_SIZES, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**_VISION, "image_size": 12, "num_channels": 1},
    )


def _clap() -> Any:
    return tf.ClapConfig(
        text_config={**_SIZES, "projection_dim": 24},
        audio_config={
            "spec_size": 32,
            "num_mel_bins": 8,
            "window_size": 2,
            "patch_size": 4,
            "patch_stride": [4, 4],
            "patch_embeds_hidden_size": 16,
            "depths": [1, 1],
            "num_attention_heads": [2, 2],
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "projection_dim": 24,
            "initializer_range": 0.3,
        },
        projection_dim=24,
    )


CLASSES: dict[str, Any] = {
    FEATURES: tf.AutoModel,
    SENTENCES: tf.AutoModel,
    "sequence-classification": tf.AutoModelForSequenceClassification,
    "token-classification": tf.AutoModelForTokenClassification,
    CAUSAL: tf.AutoModelForCausalLM,
    IMAGE_CLASSES: tf.AutoModelForImageClassification,
}
_OF_WHOLE = {
    "t5": tf.T5Model,
    "clip": tf.CLIPModel,
    "siglip": tf.SiglipModel,
    "clap": tf.ClapModel,
    "whisper": tf.WhisperForConditionalGeneration,
}
"""Checkpoints of which a task needs a part."""
PARTS: dict[tuple[str, str], Any] = {
    ("t5", FEATURES): tf.T5EncoderModel,
    ("t5", SENTENCES): tf.T5EncoderModel,
    ("clip", FEATURES): tf.CLIPVisionModel,
    ("clip", IMAGE_EMBEDDING): tf.CLIPVisionModelWithProjection,
    ("clip", TEXT_EMBEDDING): tf.CLIPTextModelWithProjection,
    ("siglip", FEATURES): tf.SiglipVisionModel,
    ("siglip", IMAGE_EMBEDDING): tf.SiglipVisionModel,
    ("siglip", TEXT_EMBEDDING): tf.SiglipTextModel,
    ("clap", AUDIO_EMBEDDING): tf.ClapAudioModelWithProjection,
}


def load_base(task: str, folder: Path) -> Any:
    config = tf.AutoConfig.from_pretrained(folder / "base")
    # These two have no class that reads their part of a whole checkpoint by its own names.
    if config.model_type == "whisper":
        return tf.WhisperModel.from_pretrained(folder / "base").encoder.eval()
    if (config.model_type, task) == ("clap", FEATURES):
        return tf.ClapModel.from_pretrained(folder / "base").audio_model.eval()
    chosen = PARTS.get((config.model_type, task)) or CLASSES[task]
    return chosen.from_pretrained(folder / "base").eval()


def write_model(family: Family, task: str, folder: Path) -> None:
    """A random model, and two adapters with random A and B that PEFT made on it."""
    torch.manual_seed(0)
    config = family.config()
    make = _OF_WHOLE.get(config.model_type) or CLASSES[task].from_config
    make(config).float().save_pretrained(folder / "base")
    if config.model_type == "clap":  # which says how many frames a spectrogram has
        sound = {"sampling_rate": 100, "max_length_s": 10, "hop_length": 8}
        (folder / "base/preprocessor_config.json").write_text(json.dumps(sound))
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
