"""What a model's forward takes is what its graph takes, or the model is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from support.families import (
    AUDIO_EMBEDDING,
    FAMILIES,
    FEATURES,
    IMAGE_EMBEDDING,
    SENTENCES,
    TEXT_EMBEDDING,
)

from loraexport.errors import BaseModelError
from loraexport.hf.facts import read_facts
from loraexport.hf.inputs.signature import Signature
from loraexport.hf.quiet import quiet_models
from loraexport.hf.skeleton import read_skeleton

_TEXT = ["input_ids int64 [batch, sequence]", "attention_mask int64 [batch, sequence]"]
_TYPES = "token_type_ids int64 [batch, sequence]"
_BOXES = "bbox int64 [batch, sequence, 4]"


def signature(folder: Path, config: Any, task: str, **preprocessor: Any) -> Signature:
    with quiet_models():
        config.save_pretrained(folder)
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return read_skeleton(folder, task, "float32").signature


@pytest.mark.parametrize(
    ("family", "task", "inputs", "output"),
    [
        ("GPT-2", FEATURES, _TEXT, "last_hidden_state float32 [batch, sequence, 32]"),
        ("CLIP (text)", TEXT_EMBEDDING, _TEXT, "text_embeds float32 [batch, 24]"),
        ("SigLIP (text)", TEXT_EMBEDDING, _TEXT, "text_embeds float32 [batch, 32]"),
        (
            "SigLIP (vision)",
            IMAGE_EMBEDDING,
            ["pixel_values float32 [batch, 1, 12, 12]"],
            "image_embeds float32 [batch, 32]",
        ),
        (
            "LayoutLM",
            FEATURES,
            [_TEXT[0], _BOXES, _TEXT[1], _TYPES],
            "last_hidden_state float32 [batch, sequence, 32]",
        ),
        (
            "LayoutLMv3",
            FEATURES,
            [_TEXT[0], _BOXES, "pixel_values float32 [batch, 3, 8, 8]", _TEXT[1], _TYPES],
            "last_hidden_state float32 [batch, sequence+5, 32]",
        ),
        (
            "LayoutLMv3",
            "token-classification",
            [_TEXT[0], _BOXES, "pixel_values float32 [batch, 3, 8, 8]", _TEXT[1], _TYPES],
            "logits float32 [batch, sequence, 2]",
        ),
        (
            "wav2vec 2.0",
            FEATURES,
            ["input_values float32 [batch, sequence]", _TEXT[1]],
            "last_hidden_state float32 [batch, (sequence-6)//12, 32]",
        ),
        (
            "Whisper (encoder)",
            FEATURES,
            ["input_features float32 [batch, 6, 18]"],
            "last_hidden_state float32 [batch, 9, 32]",
        ),
    ],
)
def test_of_a_family(
    family: str, task: str, inputs: list[str], output: str, tmp_path: Path
) -> None:
    found = signature(tmp_path, FAMILIES[family].config(), task)
    assert [str(entry) for entry in found.inputs] == inputs
    assert [str(entry) for entry in found.outputs] == [output]


def test_published_sizes_of_sounds(tmp_path: Path) -> None:
    """wav2vec2-base gives 49 steps of a second: (16000 - 80) // 320."""
    config = tf.Wav2Vec2Config(num_hidden_layers=1)
    (output,) = signature(tmp_path, config, FEATURES).outputs
    assert output.shape == ("batch", "(sequence-80)//320", "768")
    assert output.sizes(1, 16_000) == [1, 49, 768]


def test_a_processor_says_how_many_frames_clap_takes(tmp_path: Path) -> None:
    config = FAMILIES["CLAP (audio)"].config()
    with pytest.raises(BaseModelError, match=r"preprocessor_config.json: not there, and it says"):
        signature(tmp_path, config, AUDIO_EMBEDDING)
    sound = {"sampling_rate": 100, "max_length_s": 10, "hop_length": 8}
    (entry,) = signature(tmp_path, config, AUDIO_EMBEDDING, **sound).inputs
    assert str(entry) == "input_features float32 [batch, 1, 126, 8]"


@pytest.mark.parametrize(
    ("preprocessor", "size"),
    [
        ({}, 12),
        ({"do_center_crop": True, "crop_size": {"height": 8, "width": 8}, "size": 9}, 8),
        ({"size": {"height": 8, "width": 8}}, 8),
        ({"size": 8}, 8),
        ({"size": {"shortest_edge": 8}}, 12),
        ({"size": 8, "do_resize": False}, 12),
    ],
)
def test_a_processor_says_how_large_images_are(
    preprocessor: dict[str, Any], size: int, tmp_path: Path
) -> None:
    """Of a model that takes more than the config's size: DINOv2."""
    config = tf.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=4
    )
    (pixels,) = signature(tmp_path, config, FEATURES, **preprocessor).inputs
    assert pixels.shape == ("batch", "3", str(size), str(size))


def test_images_have_no_mask(tmp_path: Path) -> None:
    """ViT takes an attention_mask of patches, which no processor makes."""
    (pixels,) = signature(tmp_path, FAMILIES["ViT"].config(), FEATURES).inputs
    assert str(pixels) == "pixel_values float32 [batch, 3, 8, 12]"


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (tf.ViltConfig(), FEATURES, "type 'vilt' takes texts and images in one"),
        (tf.BlipConfig(), FEATURES, "type 'blip' takes texts and images in one"),
        (tf.VisualBertConfig(), FEATURES, "takes 'image_text_alignment', 'visual_attention_mask'"),
        (tf.BrosConfig(), FEATURES, "'bbox' too, which changes what it gives, and no graph here"),
        (tf.LongformerConfig(), FEATURES, "takes 'global_attention_mask' too"),
        (tf.XLNetConfig(), FEATURES, "takes 'input_mask', 'mems', 'perm_mask', 'target_mapping'"),
        (tf.LukeConfig(), FEATURES, "takes 'entity_attention_mask', 'entity_ids'"),
        (tf.MaskFormerConfig(), FEATURES, "takes 'pixel_mask'"),
        (tf.ViTMAEConfig(), FEATURES, "takes 'noise' too"),
        (tf.Wav2Vec2Config(), SENTENCES, "takes sounds; task 'sentence-embedding' is of texts"),
        (tf.Wav2Vec2BertConfig(), FEATURES, "takes input_features of a shape that is not known"),
        (tf.ASTConfig(), FEATURES, "does not say how many steps come of so many samples"),
        (tf.ClapConfig(audio_config={"enable_fusion": True}), AUDIO_EMBEDDING, "takes 'is_longer'"),
        (tf.ErnieConfig(use_task_id=True), FEATURES, "takes 'task_type_ids' too"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "model_type") else None,
)
def test_what_no_graph_can_take_is_refused(
    config: Any, task: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(BaseModelError, match=message):
        signature(tmp_path, config, task)


def test_facts_of_one_of_several(tmp_path: Path) -> None:
    """The positions of CLIP's text tower are in its own part of config.json."""
    config = FAMILIES["CLIP (text)"].config()
    config.save_pretrained(tmp_path)
    skeleton = read_skeleton(tmp_path, TEXT_EMBEDDING, "float32")
    assert skeleton.part == "text_config"
    facts = read_facts(tmp_path, part=skeleton.part)
    assert (facts.vocab_size, facts.max_length, facts.positions) == (60, 64, 64)
    assert read_facts(tmp_path).positions is None


def test_facts_of_boxes(tmp_path: Path) -> None:
    FAMILIES["LayoutLM"].config().save_pretrained(tmp_path)
    assert read_facts(tmp_path).max_box == 39
