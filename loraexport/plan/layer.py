"""One layer: strategy, stacks and costs put together."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.tensor_files import TensorInfo
from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.errors import AdapterConfigError

from ..spec.schema import Spec
from .costs import LayerShape, is_apart
from .stacks import BYTES_PER_VALUE, LORA, make_stacks
from .strategy import choose_strategy, costs_of


@dataclass(frozen=True)
class SiteSource:
    """Where a site's weight and bias come from; None for a tensor that `init` makes."""

    site: str
    weight: tuple[str, TensorInfo] | None
    bias: tuple[str, TensorInfo] | None
    has_bias: bool


@dataclass(frozen=True)
class LayerPlan:
    """One graph to build. Costs are per call of `tokens` tokens."""

    layer: Layer
    sources: tuple[SiteSource, ...]
    fan_in_fan_out: bool
    strategy_reason: str
    num_slots: int
    base_bytes: int
    lora_bytes: int
    base_flops_per_token: int
    lora_flops_per_token: int


def refuse_features(headers: Iterable[AdapterHeader], place: str, instead: str) -> None:
    """Raise AdapterConfigError for an adapter that brings more than A and B."""
    for header in headers:
        if header.features:
            raise AdapterConfigError(
                f"{header.path}: it uses {', '.join(header.features)} (DoRA, a bias, or whole"
                f" modules), which {place} has no place for; {instead}"
            )


def make_layer_plan(
    layer: Layer,
    sources: tuple[SiteSource, ...],
    fan_in_fan_out: bool,
    spec: Spec,
    num_slots: int,
    roles: Collection[str] = LORA,
    has_bias: bool = False,
) -> LayerPlan:
    """Strategy, stacks and costs of a layer whose sizes are known.

    Args:
        roles: of its stacks; beside LoRA those parameters that adapters replace.
        has_bias: whether the base adds a bias by a pass of its own, so that an augmented stack is
            to hold it.
    """
    rows = len(layer.slices) * layer.max_rank if "lora_A" in roles else 0
    size_in, size_out = layer.in_features, layer.out_features
    strategy, reason = choose_strategy(
        layer.kind, spec, num_slots, rows, size_in, size_out, has_bias
    )
    if strategy == "augmented" and set(roles) != set(LORA):
        strategy, reason = "masked", "a slot's own base parameters leave no [W ; B] product"
    size = BYTES_PER_VALUE[spec.export.dtype]
    widths = [size_out]
    if strategy == "augmented" and spec.base.kind == "transformers":
        shape = LayerShape(spec.typical_tokens, size_in, size_out, num_slots, rows, size)
        if is_apart(costs_of(spec), shape, len(layer.slices)):
            widths = [part.width for part in layer.slices]
    stacks = make_stacks(layer, strategy, num_slots, widths, roles, has_bias)
    in_file = any(stack.row_offset for stack in stacks) and spec.base.kind != "causal_lm"
    graph = layer.name if spec.base.kind == "layers" else "model"
    is_embedding = layer.kind == "embedding"
    lora_flops = 2 * (size_out if is_embedding else size_in + size_out)
    lora_values = sum((stack.shape[0] - stack.row_offset) * stack.shape[1] for stack in stacks)
    return LayerPlan(
        layer=replace(
            layer,
            strategy=strategy,
            stacks=stacks,
            base_rows=f"graphs/{graph}.base.safetensors" if in_file else None,
        ),
        sources=sources,
        fan_in_fan_out=fan_in_fan_out,
        strategy_reason=reason,
        num_slots=num_slots,
        base_bytes=size * size_in * size_out,
        lora_bytes=size * lora_values,
        base_flops_per_token=0 if is_embedding else 2 * size_in * size_out,
        lora_flops_per_token=lora_flops
        * (rows if strategy in ("segmented", "chunked") else rows * num_slots),
    )
