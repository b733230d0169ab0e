"""`kind: transformers`: a whole Hugging Face model whose linear layers are multi-LoRA sites.

The sites are found on the meta device, so a plan reads no weight. In the model each becomes one of
the modules of sites.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraexport_runtime.adapters import (
    LoraWeights,
    ModuleWeights,
    check_base_copies,
    read_site_weights,
)
from loraexport_runtime.devices import NUMPY_DTYPES
from loraexport_runtime.dora import output_scale
from loraexport_runtime.manifest import Layer, TensorEntry
from loraexport_runtime.stacks import assemble, lowest, pack
from loraexport_runtime.weights import digest_array

from ..errors import BaseModelError
from ..lora import STRATEGIES
from ..lora.blended import Blended
from ..lora.rows import RowBlend, RowSlots
from ..lora.strategy import Base as SiteBase
from ..lora.strategy import LinearBase
from ..plan import Plan
from ..quiet import quiet_models
from ..tensors import TORCH_DTYPES, to_numpy
from .layers import Base, SiteWeights, digest_of
from .pooling import SentencePooling
from .sites import ModelSite, RowContext, RowEmbedding, RowHead, RowLinear, SlicedSite

_META_ROWS = (2, 8)
_CLASSES: dict[str, Any] = {
    "feature-extraction": transformers.AutoModel,
    "sentence-embedding": transformers.AutoModel,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "image-classification": transformers.AutoModelForImageClassification,
    "image-embedding": transformers.CLIPVisionModelWithProjection,
}


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


def read_skeleton(directory: Path, task: str, dtype: str) -> Skeleton:
    """Build the model on the meta device and list its linear layers and embeddings.

    Raises:
        BaseModelError: transformers cannot build it.
    """
    config = _read_config(directory, task)
    kind = _model_class(config, task)
    try:
        with torch.device("meta"):
            # Only Auto classes have a public one.
            make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
            model = make(config)
    except (ValueError, ImportError, RuntimeError) as error:
        raise BaseModelError(
            f"{directory}: transformers cannot build a model of type {config.model_type!r} for task"
            f" {task!r}: {str(error).splitlines()[0]}"
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


class MultiLoraModel(nn.Module):
    """A Hugging Face model with multi-LoRA sites: the model's inputs, adapter_ids and stacks in."""

    def __init__(
        self,
        model: nn.Module,
        signature: Signature,
        pooling: nn.Module | None,
        context: RowContext,
        stack_names: Sequence[str],
        position_ids: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.rows = context.rows
        self._context = context
        self._input_names = [entry.name for entry in signature.inputs]
        self._stack_names = list(stack_names)
        self._position_ids = position_ids

    def forward(
        self,
        inputs: dict[str, Tensor],
        adapter_ids: Tensor,
        stacks: list[Tensor],
        adapter_weights: Tensor | None = None,
    ) -> Tensor:
        """adapter_ids int64 [batch]; stacks in the order of the manifest's layers; with a blend
        adapter_weights float32 [batch, S]."""
        named = dict(zip(self._stack_names, stacks, strict=True))
        self._context.begin(adapter_ids, adapter_weights, named)
        arguments = {name: inputs[name] for name in self._input_names}
        if self._position_ids and "input_ids" in inputs:
            # Rotary models export right beyond one row only if each row brings its positions.
            ids = inputs["input_ids"]
            positions = torch.arange(ids.shape[1], device=ids.device)
            arguments["position_ids"] = positions.unsqueeze(0).expand(ids.shape[0], -1)
        found = self.model(**arguments, return_dict=True)
        y = take_output(found)
        return y if self.pooling is None else self.pooling(y, inputs["attention_mask"])


def take_output(found: Mapping[str, Tensor]) -> Tensor:
    """What a task gives, of all that the model's class gives."""
    names = ("logits", "image_embeds", "last_hidden_state")
    return next(found[name] for name in names if name in found)


@dataclass(frozen=True)
class ModelModules:
    """A whole model in eager form, its stacks, and the plain model it was made of."""

    module: MultiLoraModel
    model_type: str
    """Of the config, such as `bert`."""
    layers: tuple[Layer, ...]
    signature: Signature
    blend_slots: int | None
    """The slots of adapter_weights, if rows may blend."""
    stacks: dict[str, np.ndarray] = field(repr=False)
    base_rows: dict[str, np.ndarray] = field(repr=False)
    """The base's rows by stack, for the stacks that have any."""
    output_scales: dict[str, dict[str, np.ndarray]] = field(repr=False)
    """Adapter -> site -> DoRA's g."""


def load_plain_model(directory: Path, task: str, headless: Mapping[str, int]) -> nn.Module:
    """The model in float32, evaluation mode, from safetensors only.

    Args:
        headless: linear layers that the checkpoint lacks, with their outputs; they become zero.

    Raises:
        BaseModelError: weights are missing, so that transformers would draw them at random.
    """
    config = _read_config(directory, task)
    try:
        with quiet_models(), _no_progress_bar():
            model, info = _model_class(config, task).from_pretrained(
                directory,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(f"{directory}: transformers cannot load it: {error}") from error
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


def load_model(plan: Plan) -> tuple[Base, ModelModules]:
    """Read a planned model and its adapters, and put multi-LoRA sites into it.

    Raises:
        BaseModelError: the base cannot be used.
        WeightsError, AdapterWeightsError: an adapter cannot be used on it.
    """
    assert plan.model is not None, "the plan is of a whole model"
    layers = [one.layer for one in plan.layers]
    headless = {one.slices[0].site: one.out_features for one in layers if not one.in_base}
    model: Any = load_plain_model(plan.model.directory, plan.model.task, headless)
    base = _read_base(model, layers)
    dtype = plan.spec.export.dtype
    slots: dict[int, _Slot] = {}
    scales: dict[str, dict[str, np.ndarray]] = {}
    for adapter in plan.adapters:
        check_base_copies(adapter.header, adapter.modules, base.digests)
        weights = read_site_weights(adapter.header, adapter.modules)
        scales[adapter.name] = _output_scales(weights, adapter.scale, base, layers)
        if adapter.slot is not None:
            slots[adapter.slot] = _Slot(weights, adapter.scale, scales[adapter.name])
    model = model.to(TORCH_DTYPES[dtype])
    blend = plan.spec.export.blend
    make_rows = partial(RowBlend, dtype=TORCH_DTYPES[dtype]) if blend else RowSlots
    context = RowContext(make_rows(plan.num_slots))
    stacks: dict[str, np.ndarray] = {}
    base_rows: dict[str, np.ndarray] = {}
    for layer in layers:
        rows = _base_rows(layer, base, NUMPY_DTYPES[dtype])
        base_rows |= rows
        blocks = {
            slot: pack(layer, one.weights, one.scale, NUMPY_DTYPES[dtype], rows, one.output_scales)
            for slot, one in slots.items()
        }
        for stack in layer.stacks:
            value = assemble(stack, NUMPY_DTYPES[dtype], rows.get(stack.name), blocks)
            stacks[stack.name] = value
        _replace_sites(model, layer, plan.num_slots, context, blend)
    pooling = None
    if plan.model.task == "sentence-embedding":
        pooling = SentencePooling.read(plan.model.directory)
    signature = Signature(plan.model.inputs, plan.model.outputs)
    rotary = has_rotary_positions(model.config)
    module = MultiLoraModel(model, signature, pooling, context, list(stacks), rotary)
    return base, ModelModules(
        module.eval(),
        model.config.model_type,
        tuple(layers),
        signature,
        plan.num_slots if blend else None,
        stacks,
        base_rows,
        scales,
    )


@dataclass(frozen=True)
class _Slot:
    """What fills a slot: everything that an adapter brings, by site."""

    weights: Mapping[str, ModuleWeights]
    scale: float
    output_scales: Mapping[str, np.ndarray]


def _read_base(model: nn.Module, layers: Sequence[Layer]) -> Base:
    """The frozen weights of every site, [out, in], and the digest of the whole model."""
    sites = {}
    for layer in layers:
        for part in layer.slices:
            module: Any = model.get_submodule(part.site)
            bias = getattr(module, "bias", None)
            weight = to_numpy(_weight(module))
            sites[part.site] = SiteWeights(weight, None if bias is None else to_numpy(bias))
    every = {name: digest_array(to_numpy(one)) for name, one in model.state_dict().items()}
    digests = {site: digest_array(one.weight) for site, one in sites.items()}
    return Base(sites, digests, digest_of(every))


def _output_scales(
    weights: Mapping[str, ModuleWeights], scale: float, base: Base, layers: Sequence[Layer]
) -> dict[str, np.ndarray]:
    """DoRA's g, for the sites where an adapter uses it."""
    embeddings = {layer.slices[0].site for layer in layers if layer.kind == "embedding"}
    found = {}
    for site, lora in weights.items():
        if isinstance(lora, LoraWeights) and lora.magnitude is not None:
            weight = base.sites[site].weight
            found[site] = output_scale(weight.T if site in embeddings else weight, lora, scale)
    return found


def _base_rows(layer: Layer, base: Base, dtype: np.dtype) -> dict[str, np.ndarray]:
    """What stands ahead of the slots in each stack: W^T, or the base's own parameter."""
    rows = {}
    for stack in layer.stacks:
        if stack.row_offset:
            value = np.zeros((stack.row_offset, stack.shape[1]))
            if stack.role == "output_scale":
                value[:] = 1
            for part in layer.slices:
                one = base.sites[part.site]
                columns = slice(part.offset, part.offset + part.width)
                if stack.role == "lora_B":
                    value[:, columns] = one.weight.T
                elif stack.role == "weight":
                    value[: len(one.weight)] = one.weight
                elif stack.role == "bias":
                    # Labels that the base lacks, as in stacks.pack.
                    value[:, columns] = lowest(dtype)
                    own = slice(part.offset, part.offset + len(one.weight))
                    value[:, own] = 0 if one.bias is None else one.bias
            rows[stack.name] = value.astype(dtype)
    return rows


def _replace_sites(
    model: Any, layer: Layer, num_slots: int, context: RowContext, blend: bool
) -> None:
    """Put a ModelSite in a linear layer's place, or a SlicedSite in the place of each."""
    modules: list[Any] = [model.get_submodule(part.site) for part in layer.slices]
    weight = torch.cat([_weight(module) for module in modules])
    biases = [getattr(module, "bias", None) for module in modules]
    bias = None
    if any(one is not None for one in biases):
        pieces = [
            weight.new_zeros(len(_weight(module))) if one is None else one.detach()
            for module, one in zip(modules, biases, strict=True)
        ]
        bias = torch.cat(pieces)
    roles = {stack.role for stack in layer.stacks}
    base: SiteBase
    if "weight" in roles:
        base = RowHead(weight, bias, layer, context)
    elif layer.kind == "embedding":
        base = RowEmbedding(weight, None, layer, context)
    elif roles & {"output_scale", "bias"}:
        base = RowLinear(weight, bias, layer, context)
    else:
        in_stack = any(stack.row_offset for stack in layer.stacks)
        base = LinearBase(None if in_stack else weight, bias)
    lora = None
    if "lora_A" in roles:
        make = Blended if blend else STRATEGIES[layer.strategy]
        lora = make(num_slots, len(layer.slices) * layer.max_rank, layer.in_features)
    factor = float(getattr(modules[0], "embed_scale", 1.0))
    whole = ModelSite(base, lora, layer, context, factor)
    for part in layer.slices:
        parent, _, child = part.site.rpartition(".")
        sliced = SlicedSite(whole, part.offset, part.width, context)
        setattr(model.get_submodule(parent), child, whole if len(layer.slices) == 1 else sliced)


def has_rotary_positions(config: Any) -> bool:
    """Whether the model computes rotary positions, which must come as [batch, sequence]."""
    return any(hasattr(config, name) for name in ("rope_theta", "rope_parameters"))


def _read_config(directory: Path, task: str) -> Any:
    """The config of the model that a task needs: of a whole CLIP its vision tower's."""
    try:
        config = transformers.AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
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


def _model_class(config: Any, task: str) -> Any:
    """The Auto class of a task; of an encoder-decoder's features, its encoder alone."""
    if task == "feature-extraction" and getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForTextEncoding
    return _CLASSES[task]


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _signature(model: Any, config: Any, task: str, dtype: str) -> Signature:
    import inspect

    if model.main_input_name == "pixel_values":
        return _vision_signature(model, config, task, dtype)
    accepted = inspect.signature(model.forward).parameters
    names = ["input_ids", "attention_mask"]
    if "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    inputs = tuple(TensorEntry(name, "int64", ("batch", "sequence")) for name in names)
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
        return SiteShape("embedding", module.num_embeddings, module.embedding_dim, False, None)
    return SiteShape("linear", *_sizes(module), isinstance(module, Conv1D), input_id)


def _sizes(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _weight(module: Any) -> Tensor:
    """[out, in] whatever the module stores; an embedding's [vocabulary, dim]."""
    weight: Tensor = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight
