"""A Hugging Face model on the meta device -> its sites, inputs and outputs. No weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraexport_runtime.contract.kinds import TensorEntry

from ..errors import BaseModelError
from .model import model_class, read_config, take_output
from .quiet import quiet_models

_META_ROWS = (2, 8)


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, beside adapter_ids."""

    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class SiteShape:
    """A module where LoRA may apply."""

    kind: Literal["linear", "embedding"]
    in_features: int
    """For an embedding: the vocabulary's size."""
    out_features: int
    is_conv1d: bool
    """Its weight is stored [in, out]."""
    has_bias: bool
    input_id: int | None
    """Sites with one number get the very same tensor; None: not known, or not for this kind."""


@dataclass(frozen=True)
class Skeleton:
    """A model without weights: what a plan needs to know of it."""

    sites: dict[str, SiteShape]
    """By module name, in the model's order."""
    head: tuple[str, ...]
    """The sites that `all-linear` leaves out: the output layer."""
    signature: Signature

    @property
    def inner_linear(self) -> set[str]:
        """What `all-linear` names: the linear layers but for the output layer."""
        linear = {site for site, shape in self.sites.items() if shape.kind == "linear"}
        return linear - set(self.head)


def read_skeleton(directory: Path, task: str, dtype: str) -> Skeleton:
    """Build the model on the meta device and list its linear layers and embeddings.

    Raises:
        BaseModelError: transformers cannot build it.
    """
    config = read_config(directory, task)
    kind = model_class(config, task)
    try:
        with torch.device("meta"):
            # Only Auto classes have a public one.
            make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
            model = make(config)
    except Exception as error:  # its own code, on whatever values a config has
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseModelError(
            f"{directory}: transformers cannot build a model of type {config.model_type!r} for task"
            f" {task!r}: {first}"
        ) from error
    modules = {name: module for name, module in model.named_modules() if _is_site(module)}
    signature = _signature(model, config, task, dtype)
    inputs = _find_inputs(model.eval(), modules, signature)
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = ("classifier", "score")
    head = tuple(
        name
        for name, module in modules.items()
        if _is_linear(module) and (module is output or name.split(".")[0] in heads)
    )
    sites = {name: _shape(module, inputs.get(name)) for name, module in modules.items()}
    return Skeleton(sites, head, signature)


def _find_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], signature: Signature
) -> dict[str, int]:
    """Which linear layers get the very same tensor, by a number for each tensor.

    Seen in a forward without values; a model that cannot run so has none.
    """
    seen: list[Tensor] = []  # kept alive: another tensor could take a dead one's id
    found: dict[str, int] = {}
    hooks = []
    for name, module in modules.items():
        if type(module) is nn.Linear:

            def note(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                known = [index for index, tensor in enumerate(seen) if tensor is arguments[0]]
                seen.append(arguments[0])
                found[name] = known[0] if known else len(seen) - 1

            hooks.append(module.register_forward_pre_hook(note))
    entry = signature.inputs[0]  # masks are not needed, and their values would be looked at
    kind = torch.int64 if entry.dtype == "int64" else torch.float32
    try:
        with torch.device("meta"), torch.no_grad(), quiet_models():
            model(**{entry.name: torch.zeros(entry.sizes(*_META_ROWS), dtype=kind)})
    except Exception:  # a plan goes on: without it, each site has a product of its own
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _signature(model: Any, config: Any, task: str, dtype: str) -> Signature:
    import inspect

    if model.main_input_name == "pixel_values":
        return _vision_signature(model, config, task, dtype)
    accepted = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    inputs = tuple(TensorEntry(name, "int64", ("batch", "sequence")) for name in names)
    if not hasattr(config, "hidden_size"):
        raise BaseModelError(
            f"a model of type {config.model_type!r} has no hidden_size, as one that is made of"
            f" several; take the directory of the one that task {task!r} is about"
        )
    hidden, labels = str(config.hidden_size), str(getattr(config, "num_labels", 0))
    vocabulary = str(_sizes(model.get_output_embeddings())[1]) if task == "causal-lm" else ""
    name, shape = {
        "feature-extraction": ("last_hidden_state", ("batch", "sequence", hidden)),
        "sentence-embedding": ("sentence_embedding", ("batch", hidden)),
        "sequence-classification": ("logits", ("batch", labels)),
        "token-classification": ("logits", ("batch", "sequence", labels)),
        "causal-lm": ("logits", ("batch", "sequence", vocabulary)),
    }[task]
    return Signature(inputs, (TensorEntry(name, dtype, shape),))  # type: ignore[arg-type]


def _vision_signature(model: Any, config: Any, task: str, dtype: str) -> Signature:
    """pixel_values [batch, channels, height, width] of the config's size, and what they give.

    Raises:
        BaseModelError: the config names no size, or the model takes more than pixels.
    """
    label = f"a model of type {config.model_type!r}"
    vision = getattr(config, "vision_config", config)
    size, channels = (getattr(vision, name, None) for name in ("image_size", "num_channels"))
    if task == "sentence-embedding":
        raise BaseModelError(f"{label} takes images; task {task!r} is of texts")
    if size is None or channels is None:
        raise BaseModelError(
            f"{label} takes images, but its config has no image_size and num_channels; the graph's"
            " input needs a fixed size"
        )
    shape = (channels, *((size, size) if isinstance(size, int) else size))
    try:
        with torch.no_grad():
            pixels = torch.empty(1, *shape, device="meta")
            y = take_output(model.eval()(pixels, return_dict=True))
    except Exception as error:
        raise BaseModelError(
            f"{label} does not run on pixel_values of shape {[1, *shape]} alone: {error}"
        ) from error
    names = {"image-classification": "logits", "image-embedding": "image_embeds"}
    name = names.get(task, "last_hidden_state")
    taken, given = (("batch", *map(str, sizes)) for sizes in (shape, y.shape[1:]))
    return Signature(
        (TensorEntry("pixel_values", dtype, taken),),  # type: ignore[arg-type]
        (TensorEntry(name, dtype, given),),  # type: ignore[arg-type]
    )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _is_site(module: nn.Module) -> bool:
    """Linear layers, and embeddings that are a plain look-up, at most times a factor."""
    if isinstance(module, nn.Embedding):
        plain = type(module) is nn.Embedding or hasattr(module, "embed_scale")
        return plain and module.max_norm is None
    return _is_linear(module)


def _shape(module: Any, input_id: int | None) -> SiteShape:
    if isinstance(module, nn.Embedding):
        size, width = module.num_embeddings, module.embedding_dim
        return SiteShape("embedding", size, width, False, False, None)
    has_bias = module.bias is not None
    return SiteShape("linear", *_sizes(module), isinstance(module, Conv1D), has_bias, input_id)


def _sizes(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)
