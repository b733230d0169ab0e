"""The arguments of a model's forward -> the inputs that its graph has.

An argument that changes what a model gives is an input of the graph, or the model is refused: a
name that neither table below has is one.
"""

import inspect
from typing import Any

from loraexport_runtime.errors import quoted

from ...errors import BaseModelError

_INPUTS = (
    "input_ids",
    "bbox",
    "pixel_values",
    "input_values",
    "input_features",
    "attention_mask",
    "token_type_ids",
)
"""What graphs can take, in their order."""
_LEFT_OUT = frozenset(
    (
        # What the model computes by itself where it is not given.
        *("position_ids", "inputs_embeds", "per_layer_inputs", "cache_position"),
        # Of generation, and of a decoder beside an encoder.
        *("past_key_values", "use_cache", "cache", "cache_params", "past_buckets_states", "state"),
        *("encoder_outputs", "encoder_hidden_states", "encoder_attention_mask"),
        *("decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
        *("decoder_position_ids", "logits_to_keep"),
        # Of training.
        *("labels", "return_loss", "bool_masked_pos", "mask_time_indices"),
        # How the outputs come, and of what kind; heads that are not masked.
        *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("output_a3_attentions", "head_mask", "interpolate_pos_encoding", "num_hashes"),
        *("do_pooling", "deprecated_arguments"),
    )
)
"""Arguments that nothing but the model's own code, its training or its options fill."""
_WITH_BOXES = ("layoutlm", "layoutlmv3", "lilt")
"""Models whose bbox is of whole numbers, four for each token."""
_OF_TEXTS_AND_IMAGES = ("layoutlmv3",)
_WITHOUT_TYPES = (
    *("biogpt", "codegen", "ctrl", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox"),
    *("gptj", "openai-gpt"),
)
"""Decoders that add token_type_ids where they are given, which their tokenizers never do."""


def find_inputs(model: Any, config: Any) -> tuple[str, ...]:
    """The names of a model's inputs, first of them what its rows are of.

    Raises:
        BaseModelError: forward takes what no graph can, by name.
    """
    label = f"a model of type {config.model_type!r}"
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    accepted = {parameter.name for parameter in parameters if parameter.kind not in kinds}
    accepted -= _without_effect(config)
    if not accepted & {"input_ids", "input_values"}:
        accepted.discard("attention_mask")  # images and spectrograms of one size have no padding
    if {"input_ids", "pixel_values"} <= accepted and config.model_type not in _OF_TEXTS_AND_IMAGES:
        raise BaseModelError(
            f"{label} takes texts and images in one (input_ids, pixel_values), which no graph can"
            " here; take the directory of the one of its parts that the adapters are for"
        )
    unknown = sorted(accepted - {*_INPUTS} - _LEFT_OUT)
    if "bbox" in accepted and config.model_type not in _WITH_BOXES:
        unknown.insert(0, "bbox")
    if unknown:
        raise BaseModelError(
            f"{label} takes {', '.join(map(quoted, unknown[:4]))} too, which changes what it gives,"
            " and no graph here has such an input; it cannot be built"
        )
    return tuple(name for name in _INPUTS if name in accepted)


def _without_effect(config: Any) -> set[str]:
    """Arguments that a model of this config does not look at, or that nobody fills."""
    unused = set()
    types = getattr(config, "type_vocab_size", None)
    if config.model_type in _WITHOUT_TYPES or (types is not None and types <= 1):
        unused.add("token_type_ids")
    if config.model_type == "ernie" and not config.use_task_id:
        unused.add("task_type_ids")
    if config.model_type == "layoutlmv3" and not config.visual_embed:
        unused.add("pixel_values")
    if config.model_type == "clap_audio_model" and not config.enable_fusion:
        unused.add("is_longer")
    return unused
