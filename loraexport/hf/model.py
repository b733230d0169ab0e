"""A Hugging Face model as it is: its class for a task, its weights, what it gives."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Layer

from ..errors import BaseModelError
from .checkpoint import read_float_weights, stored_dtype
from .folder import CONFIG, foreign_code, read_values
from .limits import check_config
from .own_class import require_own_class
from .quiet import quiet_models

_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_NUMBER = re.compile(r"\.\d+\.")
_CLASSES: dict[str, Any] = {
    "feature-extraction": transformers.AutoModel,
    "sentence-embedding": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
}
_CLIP = {"feature-extraction": "vision_config", "image-embedding": "vision_config"}
_TOWERS = {
    "clip": _CLIP | {"text-embedding": "text_config"},
    "siglip": _CLIP | {"text-embedding": "text_config"},
    "clap": {"feature-extraction": "audio_config", "audio-embedding": "audio_config"},
}
"""Models of several -> by task, where their config has that of the one that it is about."""
_PARTS: dict[tuple[str, str], tuple[Any, str | None]] = {
    ("clip_vision_model", "image-embedding"): (transformers.CLIPVisionModelWithProjection, None),
    ("clip_text_model", "text-embedding"): (transformers.CLIPTextModelWithProjection, None),
    ("siglip_vision_model", "image-embedding"): (transformers.SiglipVisionModel, None),
    ("siglip_text_model", "text-embedding"): (transformers.SiglipTextModel, None),
    ("siglip_text_model", "feature-extraction"): (transformers.SiglipTextModel, None),
    ("clap_audio_model", "audio-embedding"): (transformers.ClapAudioModelWithProjection, None),
    ("clap_audio_model", "feature-extraction"): (transformers.ClapAudioModel, r"^audio_model\."),
    ("whisper", "feature-extraction"): (
        transformers.models.whisper.modeling_whisper.WhisperEncoder,
        r"^(model\.)?encoder\.",
    ),
}
"""(model type, task) -> a class that no Auto class gives, and what stands before its weights' names
in a checkpoint of the whole."""
OUTPUTS = {
    "feature-extraction": "last_hidden_state",
    "sentence-embedding": "sentence_embedding",
    "sequence-classification": "logits",
    "token-classification": "logits",
    "causal-lm": "logits",
    "image-classification": "logits",
    "image-embedding": "image_embeds",
    "text-embedding": "text_embeds",
    "audio-embedding": "audio_embeds",
}
"""What a graph's output is called."""


def take_output(outputs: Mapping[str, Tensor], task: str) -> Tensor:
    """What a task gives, of all that the model's class gives; before what stands behind it."""
    if task == "sentence-embedding":
        return outputs["last_hidden_state"]
    if task.endswith("-embedding") and OUTPUTS[task] not in outputs:
        return outputs["pooler_output"]
    return outputs[OUTPUTS[task]]


def headless_widths(layers: Iterable[Layer]) -> dict[str, int]:
    """The heads that the base lacks: site -> outputs."""
    return {layer.slices[0].site: layer.out_features for layer in layers if not layer.in_base}


def load_stored_decoder(directory: Path) -> nn.Module:
    """A model that generates, its weights in the dtype that the checkpoint has, all else float32.

    Raises:
        BaseModelError: see load_plain_model.
    """
    dtype = _STORED[stored_dtype(directory)]
    model = load_plain_model(directory, "causal-lm", {}, dtype)
    if dtype == torch.float32:
        return model
    # What a class computes for itself is of the dtype that the model is made in.
    config = read_task_config(directory, "causal-lm")
    with quiet_models(), _meta_parameters():
        whole: Any = model_class(config, "causal-lm").from_config(config, dtype=torch.float32)
    whole.load_state_dict(model.state_dict(), assign=True)
    whole.config.use_cache = False
    return whole.eval()


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Modules are made without the memory of their parameters; buffers are there."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def load_plain_model(
    directory: Path, task: str, headless: Mapping[str, int], dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The model in float32, evaluation mode, from safetensors only.

    Args:
        headless: linear layers that the checkpoint lacks, with their outputs; they become zero.
        dtype: of the weights, another one than float32.

    Raises:
        BaseModelError: weights are missing, so that transformers would draw them at random.
    """
    config = read_task_config(directory, task)
    read_float_weights(directory)
    with (
        foreign_code(f"{directory}: transformers cannot load it"),
        quiet_models(),
        no_progress_bar(),
        torch.random.fork_rng(devices=[]),
    ):
        # What transformers draws although its class lets it be missing is the same each time.
        torch.manual_seed(0)
        kind = model_class(config, task)
        model, info = kind.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            key_mapping=key_mapping(kind),
            trust_remote_code=False,
            output_loading_info=True,
        )
    require_weights(directory, task, model, info["missing_keys"], info["unexpected_keys"], headless)
    with torch.no_grad():
        for name in info["missing_keys"]:
            if _is_unused(name, task):
                model.get_parameter(name).zero_()
    for site, width in headless.items():
        _put_zeros(model, site, width)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BaseModelError(f"{directory}: {name!r} holds NaN or Inf")
    model.config.use_cache = False
    return model.eval()


def require_weights(
    directory: Path,
    task: str,
    model: nn.Module,
    missing: Iterable[str],
    unexpected: Iterable[str],
    headless: Collection[str],
) -> None:
    """Hold what a checkpoint lacks to what has no part in the output, or comes with adapters.

    Args:
        missing: weights that transformers would draw at random.
        unexpected: tensors that the model has no place for.
        headless: linear layers that every adapter brings.

    Raises:
        BaseModelError: another weight is missing, or the checkpoint has more layers of a kind than
            config.json says.
    """
    brought = {f"{site}.{part}" for site in headless for part in ("weight", "bias")}
    needed = sorted({name for name in missing if not _is_unused(name, task)} - brought)
    if needed:
        raise BaseModelError(
            f"{directory}: {len(needed)} weights are missing for task {task!r}, first"
            f" {needed[0]!r}; the checkpoint is of another task, or every adapter has to bring"
            " them (modules_to_save)"
        )
    kinds = {_NUMBER.sub(".#.", name) for name in model.state_dict()}
    more = sorted(name for name in unexpected if _NUMBER.sub(".#.", name) in kinds)
    if more:
        raise BaseModelError(
            f"{directory}: config.json asks for fewer layers than the checkpoint has, such as"
            f" {more[0]!r}; the two are of different models: correct or download them again"
        )


def _is_unused(name: str, task: str) -> bool:
    """Whether a weight has no part in a task's output: a pooler's, beside the hidden states."""
    return name.startswith("pooler.") and task in ("feature-extraction", "sentence-embedding")


def _put_zeros(model: Any, site: str, width: int) -> None:
    module = model.get_submodule(site)
    zeros = nn.Linear(module.in_features, width, module.bias is not None)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    parent, _, child = site.rpartition(".")
    setattr(model.get_submodule(parent), child, zeros)


def has_rotary_positions(config: Any) -> bool:
    """Whether the model computes rotary positions, which must come as [batch, sequence]."""
    return any(hasattr(config, name) for name in ("rope_theta", "rope_parameters"))


def read_task_config(directory: Path, task: str) -> Any:
    """The config of the model that a task needs: of a whole CLIP one tower's.

    Raises:
        BaseModelError: config.json is broken, or not of a model that the task's class computes.
    """
    config = read_whole_config(directory)
    require_own_class(config, directory)
    with foreign_code(f"{directory}: {CONFIG} does not fit a model of type {config.model_type!r}"):
        tower = find_tower(config, task)
        if tower is not None:
            config = getattr(config, tower)
        if task in ("image-embedding", "text-embedding", "audio-embedding"):
            known = [kind for kind, of_task in _PARTS if of_task == task]
            if config.model_type not in known:
                raise BaseModelError(
                    f"{directory}: task {task!r} is of {' and '.join(known)}, and this is a model"
                    f" of type {config.model_type!r}; use 'feature-extraction'"
                )
        # What a checkpoint says of its attention is of the machine that saved it.
        config._attn_implementation = None
    return config


def find_tower(whole: Any, task: str) -> str | None:
    """Where the config of several models has that of the one that a task is about."""
    return _TOWERS.get(whole.model_type, {}).get(task)


def refuse_dynamic_rope(directory: Path, task: str) -> None:
    """Raise BaseModelError for rotary factors that no trace of the model can hold."""
    config = read_task_config(directory, task)
    with foreign_code(f"{directory}: {CONFIG} does not fit a model of type {config.model_type!r}"):
        rope = getattr(config, "rope_parameters", None) or {}
        entries = (rope, *rope.values())
        kinds = [entry.get("rope_type") for entry in entries if isinstance(entry, dict)]
    if "dynamic" in kinds:
        raise BaseModelError(
            f"{directory}: a model of type {config.model_type!r} with rope_type 'dynamic' computes"
            " its frequencies anew when a longer text comes; a traced graph cannot. Use rope_type"
            " 'linear' or 'yarn', or let it generate (base.kind: causal_lm), where texts end at"
            " max_position_embeddings and need no others"
        )


def read_whole_config(directory: Path) -> Any:
    """The config of all that the directory holds."""
    values = read_values(directory)
    check_config(values, directory / CONFIG)
    with foreign_code(f"{directory}: no model that transformers knows"), quiet_models():
        return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)


def model_class(config: Any, task: str) -> Any:
    """The class of a task, most often an Auto class; of an encoder-decoder's texts, its encoder
    alone."""
    if (config.model_type, task) in _PARTS:
        return _PARTS[config.model_type, task][0]
    of_texts = task in ("feature-extraction", "sentence-embedding")
    if of_texts and getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForTextEncoding
    return _CLASSES[task]


def key_mapping(kind: type) -> dict[str, str] | None:
    """Patterns of stored names -> what they become, for a part that has none of its own."""
    befores = [before for part, before in _PARTS.values() if part is kind and before is not None]
    return {befores[0]: ""} if befores else None


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
