"""`kind: transformers`: a whole Hugging Face model whose linear layers are multi-LoRA sites.

The sites are found on the meta device, so a plan reads no weight. In the model each site becomes a
`ModelSite`, which flattens rows and tokens to [tokens, in] and calls the strategies of layers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraexport_runtime.manifest import Layer, TensorEntry
from loraexport_runtime.stacks import assemble, pack
from loraexport_runtime.weights import digest_array

from ..errors import BaseModelError
from ..lora import STRATEGIES
from ..lora.strategy import LinearBase, Routing, Strategy
from ..plan import Plan
from ..quiet import quiet_models
from ..tensors import TORCH_DTYPES, to_numpy
from .layers import AdapterWeights, Base, SiteWeights, digest_of, load_adapters
from .pooling import SentencePooling

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
class Skeleton:
    """A model without weights: what a plan needs to know of it."""

    sites: dict[str, tuple[int, int]]
    """Module name -> (in_features, out_features), in the model's order."""
    head: tuple[str, ...]
    """The sites that `all-linear` leaves out: the output layer."""
    signature: Signature


def read_skeleton(directory: Path, task: str, dtype: str) -> Skeleton:
    """Build the model on the meta device and list its linear layers.

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
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = ("classifier", "score")
    head = tuple(
        name for name, module in linear.items() if module is output or name.split(".")[0] in heads
    )
    return Skeleton(
        {name: _sizes(module) for name, module in linear.items()},
        head,
        _signature(model, config, task, dtype),
    )


class RowContext:
    """What one forward of the model shares among its sites: routing by row, and the stacks."""

    def __init__(self, router: Strategy) -> None:
        self.router = router
        self.stacks: Mapping[str, Tensor] = {}
        self._adapter_ids: Tensor | None = None
        self._routings: dict[int, Routing] = {}

    def begin(self, adapter_ids: Tensor, stacks: Mapping[str, Tensor]) -> None:
        self._adapter_ids, self.stacks, self._routings = adapter_ids, stacks, {}

    def fits(self, x: Tensor) -> bool:
        """Whether the first dimension of x is the batch, so that rows can have adapters."""
        assert self._adapter_ids is not None, "begin() starts a forward"
        return x.dim() in (2, 3) and x.shape[0] == self._adapter_ids.shape[0]

    def routing(self, x: Tensor) -> Routing:
        """For x [batch, in] or [batch, n, in]: a row is a segment of 1 or n tokens.

        Sites of one rank share the n of the first: a text model has one sequence length.
        """
        assert self._adapter_ids is not None, "begin() starts a forward"
        if x.dim() not in self._routings:
            batch, tokens = x.shape[0], x.shape[1] if x.dim() == 3 else 1
            rows = torch.arange(batch + 1, device=x.device)
            self._routings[x.dim()] = self.router.route(
                rows * tokens, self._adapter_ids, batch * tokens
            )
        return self._routings[x.dim()]


class ModelSite(nn.Module):
    """y = W x + b + scaling[s] B[s] (A[s] x) for every token, s the slot of its row."""

    def __init__(self, base: LinearBase, lora: Strategy, layer: Layer, context: RowContext) -> None:
        super().__init__()
        self.site = layer.name
        self.base = base
        self.lora = lora
        self.stack_names = tuple(stack.name for stack in layer.stacks)
        self.context = context

    @property
    def weight(self) -> Tensor | None:
        """[out, in], for models that ask a layer's weight for its dtype (T5); None in a stack."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in] or [batch, n, in] -> the same with out for in."""
        if not self.context.fits(x):
            raise BaseModelError(
                f"site {self.site!r} gets a tensor of shape {list(x.shape)}, where a batch of rows"
                " has to come first; its adapters cannot be told apart"
            )
        a, b = (self.context.stacks[name] for name in self.stack_names)
        tokens = x.reshape(-1, x.shape[-1])
        y = self.lora.linear(tokens, self.base, self.context.routing(x), a, b)
        return y.view(*x.shape[:-1], -1)


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
        self.routing = context.router
        self._context = context
        self._input_names = [entry.name for entry in signature.inputs]
        self._stack_names = list(stack_names)
        self._position_ids = position_ids

    def forward(
        self, inputs: dict[str, Tensor], adapter_ids: Tensor, stacks: list[Tensor]
    ) -> Tensor:
        """adapter_ids int64 [batch]; stacks in the order of the manifest's layers."""
        self._context.begin(adapter_ids, dict(zip(self._stack_names, stacks, strict=True)))
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
    stacks: dict[str, np.ndarray] = field(repr=False)
    base_rows: dict[str, dict[str, np.ndarray]] = field(repr=False)
    """File inside the artifact -> the base's part of a stack, for augmented sites."""


def load_plain_model(directory: Path, task: str) -> nn.Module:
    """The model in float32, evaluation mode, from safetensors only.

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
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise BaseModelError(
            f"{directory}: {len(missing)} weights are missing for task {task!r}, first"
            f" {missing[0]!r}; the checkpoint is of another task"
        )
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise BaseModelError(f"{directory}: {name!r} holds NaN or Inf")
    model.config.use_cache = False
    return model.eval()


def load_model(plan: Plan) -> tuple[Base, ModelModules]:
    """Read a planned model and its adapters, and put multi-LoRA sites into it.

    Raises:
        BaseModelError: the base cannot be used.
        WeightsError, AdapterWeightsError: an adapter cannot be used on it.
    """
    assert plan.model is not None, "the plan is of a whole model"
    layers = [one.layer for one in plan.layers]
    model: Any = load_plain_model(plan.model.directory, plan.model.task)
    base = _read_base(model, layers)
    adapters = load_adapters(plan, base)
    slots = {
        adapter.slot: (adapters[adapter.name], adapter.scale)
        for adapter in plan.adapters
        if adapter.slot is not None
    }
    dtype = plan.spec.export.dtype
    model = model.to(TORCH_DTYPES[dtype])
    first = layers[0]
    router = STRATEGIES[first.strategy](plan.num_slots, first.max_rank, first.in_features)
    context = RowContext(router)
    stacks: dict[str, np.ndarray] = {}
    base_rows: dict[str, dict[str, np.ndarray]] = {}
    for layer in layers:
        stacks |= _replace_site(model, layer, slots, plan.num_slots, context)
        if layer.base_rows is not None:
            b = layer.stacks[1]
            base_rows[layer.base_rows] = {b.name: stacks[b.name][: b.row_offset]}
    pooling = None
    if plan.model.task == "sentence-embedding":
        pooling = SentencePooling.read(plan.model.directory)
    signature = Signature(plan.model.inputs, plan.model.outputs)
    rotary = has_rotary_positions(model.config)
    module = MultiLoraModel(model, signature, pooling, context, list(stacks), rotary)
    kind = model.config.model_type
    return base, ModelModules(module.eval(), kind, tuple(layers), signature, stacks, base_rows)


def _read_base(model: nn.Module, layers: Sequence[Layer]) -> Base:
    """The frozen weights of every site, [out, in], and the digest of the whole model."""
    sites = {}
    for layer in layers:
        module: Any = model.get_submodule(layer.slices[0].site)
        bias = None if module.bias is None else to_numpy(module.bias)
        sites[layer.slices[0].site] = SiteWeights(to_numpy(_weight(module)), bias)
    every = {name: digest_array(to_numpy(one)) for name, one in model.state_dict().items()}
    digests = {site: digest_array(one.weight) for site, one in sites.items()}
    return Base(sites, digests, digest_of(every))


def _replace_site(
    model: Any,
    layer: Layer,
    slots: Mapping[int, tuple[AdapterWeights, float]],
    num_slots: int,
    context: RowContext,
) -> dict[str, np.ndarray]:
    """Put a ModelSite in a linear layer's place; give the initial value of its stacks."""
    site = layer.slices[0].site
    linear: Any = model.get_submodule(site)
    weight = _weight(linear)
    bias = None if linear.bias is None else linear.bias.detach()
    rows = to_numpy(weight)
    blocks = {
        slot: pack(layer, weights, scale, rows.dtype) for slot, (weights, scale) in slots.items()
    }
    stacks = {
        stack.name: assemble(stack, rows.dtype, rows.T if stack.row_offset else None, blocks)
        for stack in layer.stacks
    }
    in_stack = any(stack.row_offset for stack in layer.stacks)
    lora = STRATEGIES[layer.strategy](num_slots, layer.max_rank, layer.in_features)
    parent, _, child = site.rpartition(".")
    replaced = ModelSite(LinearBase(None if in_stack else weight, bias), lora, layer, context)
    setattr(model.get_submodule(parent), child, replaced)
    return stacks


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


def _sizes(module: Any) -> tuple[int, int]:
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _weight(module: Any) -> Tensor:
    """[out, in], whatever the module stores."""
    weight: Tensor = module.weight.detach()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight
