"""A Hugging Face model on the meta device -> its sites, inputs and outputs. No weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraexport_runtime.contract.kinds import sequence_of
from loraexport_runtime.contract.naming import Naming

from .folder import foreign_code
from .inputs.signature import Signature, meta_inputs, read_signature, without_values
from .limits import bounded_modules
from .model import find_tower, model_class, read_task_config, read_whole_config
from .names.naming import naming_of
from .quiet import quiet_models

_META_ROWS = (2, 8)


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
    task_layers: tuple[str, ...]
    """The linear layers that a classifier has beyond its base model, and that one's pooler."""
    signature: Signature
    naming: Naming
    """How adapters may call the sites."""
    part: str | None
    """The key of config.json that has this model's own config, if it is one of several."""
    model: Any = field(repr=False)
    """Itself, on the meta device."""
    attentions: tuple[str, ...] = ()
    """torch.nn.MultiheadAttention, which reads its layers' weights and never calls them."""

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
    config = read_task_config(directory, task)
    kind = model_class(config, task)
    label = f"a model of type {config.model_type!r} for task {task!r}"
    with foreign_code(f"{directory}: transformers cannot build {label}"), quiet_models():
        with torch.device("meta"), bounded_modules(directory):
            # Only Auto classes have a public one.
            make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
            model = make(config)
        all_modules = dict(model.named_modules())
        attentions = tuple(
            name
            for name, module in all_modules.items()
            if isinstance(module, nn.MultiheadAttention)
        )
        modules = {
            name: module
            for name, module in all_modules.items()
            if _is_site(module) and name.rpartition(".")[0] not in attentions
        }
        signature = read_signature(model, config, task, dtype, directory)
        inputs = _find_inputs(model.eval(), modules, signature)
        has_output = hasattr(model, "get_output_embeddings")
        output = model.get_output_embeddings() if has_output else None
        heads = ("classifier", "score")
        head = tuple(
            name
            for name, module in modules.items()
            if _is_linear(module) and (module is output or name.split(".")[0] in heads)
        )
        sites = {name: _shape(module, inputs.get(name)) for name, module in modules.items()}
        whole = read_whole_config(directory)
        naming, part = naming_of(model, whole), find_tower(whole, task)
    layers = _task_layers(model, modules)
    return Skeleton(sites, head, layers, signature, naming, part, model, attentions)


def _task_layers(model: Any, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    inner = model.base_model_prefix
    if not isinstance(getattr(model, inner, None), nn.Module):
        return ()  # the bare model
    return tuple(
        name
        for name, module in modules.items()
        if _is_linear(module) and (name.split(".")[0] != inner or ".pooler." in name)
    )


def _find_inputs(
    model: nn.Module, modules: Mapping[str, nn.Module], signature: Signature
) -> dict[str, int]:
    """Which linear layers get the very same tensor, by a number for each tensor.

    Seen in a forward without values; a model that cannot run so has none.
    """
    seen: list[Tensor] = []  # kept alive: another tensor could take a dead one's id
    inputs: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, module in modules.items():
        if type(module) is nn.Linear:

            def note(_: nn.Module, arguments: tuple[Tensor, ...], name: str = name) -> None:
                indices = [index for index, tensor in enumerate(seen) if tensor is arguments[0]]
                seen.append(arguments[0])
                index = indices[0] if indices else len(seen) - 1
                inputs[name] = (*inputs.get(name, ()), index)

            hooks.append(module.register_forward_pre_hook(note))
    batch, steps = _META_ROWS
    sequence = sequence_of(signature.outputs, steps)
    for module in model.modules():
        if getattr(module, "rope_type", None) == "dynamic":
            module.rope_type = "default"  # type: ignore[assignment]  # it asks how long a text is
    try:
        with without_values():
            model(**meta_inputs(signature.inputs, sequence, batch))
    except Exception:  # a plan goes on: without it, each site has a product of its own
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    # A site that is called twice shares with those that get the same tensors in the same order.
    numbers = {indices: number for number, indices in enumerate(dict.fromkeys(inputs.values()))}
    return {name: numbers[indices] for name, indices in inputs.items()}


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
