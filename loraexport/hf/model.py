"""A Hugging Face model as it is: its class for a task, its weights, what it gives."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from loraexport_runtime.contract.foreign import read_object
from loraexport_runtime.contract.manifest import Layer

from ..errors import BaseModelError
from .quiet import quiet_models

_CLASSES: dict[str, Any] = {
    "feature-extraction": transformers.AutoModel,
    "sentence-embedding": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
    "image-embedding": transformers.CLIPVisionModelWithProjection,
}


def take_output(found: Mapping[str, Tensor]) -> Tensor:
    """What a task gives, of all that the model's class gives."""
    names = ("logits", "image_embeds", "last_hidden_state")
    return next(found[name] for name in names if name in found)


def headless_widths(layers: Iterable[Layer]) -> dict[str, int]:
    """The heads that the base lacks: site -> outputs."""
    return {layer.slices[0].site: layer.out_features for layer in layers if not layer.in_base}


def load_plain_model(directory: Path, task: str, headless: Mapping[str, int]) -> nn.Module:
    """The model in float32, evaluation mode, from safetensors only.

    Args:
        headless: linear layers that the checkpoint lacks, with their outputs; they become zero.

    Raises:
        BaseModelError: weights are missing, so that transformers would draw them at random.
    """
    config = read_config(directory, task)
    try:
        with quiet_models(), no_progress_bar():
            model, info = model_class(config, task).from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # its own code, on a config and weights that do not fit it
        raise BaseModelError(
            f"{directory}: transformers cannot load it: {type(error).__name__}: {error}"
        ) from error
    drawn = {f"{site}.{part}" for site in headless for part in ("weight", "bias")}
    missing = sorted(
        name
        for name in info["missing_keys"]
        if not name.startswith("pooler.") and name not in drawn
    )
    if missing:
        raise BaseModelError(
            f"{directory}: {len(missing)} weights are missing for task {task!r}, first"
            f" {missing[0]!r}; the checkpoint is of another task, or every adapter has to bring"
            " them (modules_to_save)"
        )
    for site, width in headless.items():
        _put_zeros(model, site, width)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BaseModelError(f"{directory}: {name!r} holds NaN or Inf")
    model.config.use_cache = False
    return model.eval()


def _put_zeros(model: Any, site: str, width: int) -> None:
    own = model.get_submodule(site)
    zeros = nn.Linear(own.in_features, width, own.bias is not None)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    parent, _, child = site.rpartition(".")
    setattr(model.get_submodule(parent), child, zeros)


def has_rotary_positions(config: Any) -> bool:
    """Whether the model computes rotary positions, which must come as [batch, sequence]."""
    return any(hasattr(config, name) for name in ("rope_theta", "rope_parameters"))


def read_config(directory: Path, task: str) -> Any:
    """The config of the model that a task needs: of a whole CLIP its vision tower's."""
    read_object(directory / "config.json", BaseModelError, "give a Hugging Face model's directory")
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except Exception as error:  # a class of its own for every kind of value that does not fit
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelError(f"{directory}: no model that transformers knows: {first}") from error
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [one.get("rope_type") for one in (rope, *rope.values()) if isinstance(one, dict)]
    if "dynamic" in kinds:
        raise BaseModelError(
            f"{directory}: a model of type {config.model_type!r} with rope_type 'dynamic' computes"
            " its frequencies anew when a longer text comes; a graph cannot. Use another rope_type,"
            " such as 'yarn' or 'linear'"
        )
    if config.model_type == "clip" and task in ("feature-extraction", "image-embedding"):
        config = config.vision_config
    if task == "image-embedding" and config.model_type != "clip_vision_model":
        raise BaseModelError(
            f"{directory}: task 'image-embedding' is of CLIP's vision tower, and this is a model of"
            f" type {config.model_type!r}; use 'feature-extraction'"
        )
    # What a checkpoint says of its attention is of the machine that saved it.
    config._attn_implementation = None
    return config


def model_class(config: Any, task: str) -> Any:
    """The Auto class of a task; of an encoder-decoder's features, its encoder alone."""
    if task == "feature-extraction" and getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForTextEncoding
    return _CLASSES[task]


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Hide what transformers draws while it reads or writes weights."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
