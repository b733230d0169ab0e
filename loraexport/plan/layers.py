"""One layer of a plan: where its tensors are, which strategy and why, its stacks and costs."""

import difflib
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.tensor_files import FLOAT_DTYPES, TensorInfo
from loraexport_runtime.contract.manifest import BIAS_ROWS, Layer, Slice, Stack, Strategy
from loraexport_runtime.errors import AdapterConfigError

from ..errors import BaseModelError
from ..spec.schema import EmbeddingSpec, LayerSpec, LinearSpec, SliceSpec, Spec
from .costs import Costs, Shape, read_costs

_own_costs = functools.cache(read_costs)  # every layer of a plan asks for them
LORA = ("lora_A", "lora_B")
ROW_STEP = 8
"""Rows of a stack are so many together that products read them fastest."""
BYTES_PER_VALUE = {"float32": 4, "float16": 2, "bfloat16": 2}


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


def choose_strategy(
    kind: Literal["linear", "embedding"],
    spec: Spec,
    num_slots: int,
    rows_per_slot: float,
    in_size: int,
    out_size: int,
    has_bias: bool = False,
) -> tuple[Strategy, str]:
    """The strategy of a layer, and why.

    `auto` takes what costs least on the GPU that `tune` names (see costs.py): of a whole model or
    a decoder masked or augmented, which share their mask, of a single layer chunked too. On a CPU
    masked costs 1.3 to 1.7 times the base, augmented 2 to 3.2.
    """
    asked, tune, tokens = spec.export.strategy, spec.export.tune, spec.typical_tokens
    if spec.export.blend:
        return "masked", "the mask holds each row's weights of the slots"
    if spec.base.kind == "onnx":
        return "masked", "it joins a graph that exists, whose products stay as they are"
    if spec.base.kind == "causal_lm" and spec.base.weights == "int4":
        return "masked", "a product of int4 weights cannot take B too"
    if spec.base.kind == "causal_lm" and asked in ("segmented", "chunked"):
        return "masked", f"it joins a graph that exists, which {asked} cannot"
    if asked == "augmented" and kind == "embedding":
        return "masked", "an embedding has no [W ; B] product; masked is its nearest form"
    if asked != "auto":
        return asked, "the spec asks for it"
    if tune.device == "cpu":
        return "masked", "on a CPU masked costs least: augmented is never prepacked"
    if kind == "embedding":
        return "masked", "its shrink is a gather, so only the expand is a product"
    costs = _costs(spec)
    size = BYTES_PER_VALUE[spec.export.dtype]
    shape = Shape(tokens, in_size, out_size, num_slots, rows_per_slot, size, has_bias)
    candidates: list[Strategy] = ["augmented", "masked"]
    if spec.base.kind == "layers":
        candidates.append("chunked")
    added = {one: costs.added(one, shape) for one in candidates}
    best, *others = sorted(candidates, key=lambda one: added[one])
    rest = ", ".join(f"{one} {added[one]:.1f}" for one in others)
    return best, (
        f"least by the costs of one {costs.device} for {tokens} tokens and {num_slots} slots:"
        f" {added[best]:.1f} us over the base; {rest}"
    )


def _costs(spec: Spec) -> Costs:
    return spec.export.tune.costs or _own_costs()


def refuse_features(headers: Iterable[AdapterHeader], place: str, instead: str) -> None:
    """Raise AdapterConfigError for an adapter that brings more than A and B."""
    for header in headers:
        if header.features:
            raise AdapterConfigError(
                f"{header.path}: it uses {', '.join(header.features)} (DoRA, a bias, or whole"
                f" modules), which {place} has no place for; {instead}"
            )


def plan_layer(
    layer: LayerSpec,
    tensors: Mapping[str, TensorInfo] | None,
    spec: Spec,
    num_slots: int,
    max_rank: int,
) -> LayerPlan:
    parts: tuple[SliceSpec | LinearSpec | EmbeddingSpec, ...]
    parts = layer.slices if isinstance(layer, LinearSpec) and layer.slices else (layer,)
    sources, slices, offset = [], [], 0
    in_features = layer.in_features if isinstance(layer, LinearSpec) else layer.num_embeddings
    for part in parts:
        where = f"base layer {layer.name!r}"
        where += f", slice {part.name!r}" if part is not layer else ""
        source = _find_source(part, tensors, where)
        asked = part.embedding_dim if isinstance(part, EmbeddingSpec) else part.out_features
        transposed = isinstance(layer, EmbeddingSpec) or layer.fan_in_fan_out
        in_features, width = _sizes(source, in_features, asked, transposed, where)
        slices.append(Slice(part.name, source.site, offset, width))
        sources.append(source)
        offset += width
    assert in_features is not None, "a layer has at least one slice, and that sets in_features"
    formats = spec.export.formats
    return make_layer_plan(
        Layer(
            name=layer.name,
            kind="linear" if isinstance(layer, LinearSpec) else "embedding",
            in_features=in_features,
            out_features=offset,
            slices=tuple(slices),
            max_rank=max_rank,
            strategy="masked",
            stacks=(),
            base_rows=None,
            in_base=True,
            labels=False,
            onnx=f"graphs/{layer.name}.onnx" if "onnx" in formats else None,
            torchscript=f"graphs/{layer.name}.ts" if "torchscript" in formats else None,
        ),
        tuple(sources),
        isinstance(layer, LinearSpec) and layer.fan_in_fan_out,
        spec,
        num_slots,
        has_bias=any(source.has_bias for source in sources),
    )


def make_layer_plan(
    layer: Layer,
    sources: tuple[SiteSource, ...],
    fan_in_fan_out: bool,
    spec: Spec,
    num_slots: int,
    roles: Collection[str] = LORA,
    has_bias: bool = False,
    slot_rows: tuple[int, ...] | None = None,
) -> LayerPlan:
    """Strategy, stacks and costs of a layer whose sizes are known.

    Args:
        roles: of its stacks; beside LoRA those parameters that adapters replace.
        has_bias: whether the base adds a bias by a pass of its own, so that an augmented stack is
            to hold it.
        slot_rows: of each slot, where slots stay as built; default: every slice at max_rank.
    """
    rows = len(layer.slices) * layer.max_rank if "lora_A" in roles else 0
    on_average = sum(slot_rows) / num_slots if slot_rows else rows
    size_in, size_out = layer.in_features, layer.out_features
    strategy, reason = choose_strategy(
        layer.kind, spec, num_slots, on_average, size_in, size_out, has_bias
    )
    if strategy == "augmented" and set(roles) != set(LORA):
        strategy, reason = "masked", "a slot's own base parameters leave no [W ; B] product"
    size = BYTES_PER_VALUE[spec.export.dtype]
    widths = [size_out]
    if strategy == "augmented" and spec.base.kind == "transformers":
        shape = Shape(spec.typical_tokens, size_in, size_out, num_slots, on_average, size)
        if _costs(spec).is_apart(shape, len(layer.slices)):
            widths = [part.width for part in layer.slices]
    stacks = make_stacks(layer, strategy, num_slots, widths, roles, has_bias, slot_rows)
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
        * (rows if strategy in ("segmented", "chunked") else sum(slot_rows or [rows] * num_slots)),
    )


def make_stacks(
    layer: Layer,
    strategy: Strategy,
    num_slots: int,
    widths: Sequence[int],
    roles: Collection[str] = LORA,
    has_bias: bool = False,
    slot_rows: tuple[int, ...] | None = None,
) -> tuple[Stack, ...]:
    """The overridable initializers of a layer; every slot is one block of whole rows.

    Args:
        widths: the columns of each stack of role lora_B, side by side.
        slot_rows: as of `make_layer_plan`.
    """
    size_in, size_out = layer.in_features, layer.out_features
    rows = len(layer.slices) * layer.max_rank if "lora_A" in roles else 0
    is_augmented = strategy == "augmented"
    of_bias = BIAS_ROWS if is_augmented and has_bias else 0
    # Role -> width, rows of a slot, rows of the base ahead of them.
    sizes = {
        "lora_A": (rows, size_in, 0) if layer.kind == "embedding" else (size_in, rows, of_bias),
        "lora_B": (size_out, rows, size_in + of_bias if is_augmented else 0),
        "output_scale": (size_out, 1, 1),
        "bias": (size_out, 1, 1),
        "weight": (size_in, size_out, size_out),
    }
    stacks = []
    for role, (whole, per_slot, ahead) in sizes.items():
        if role in roles:
            name = f"{layer.name}.{'weight_lora_B' if role == 'lora_B' and ahead else role}"
            left = 0
            own = slot_rows if role in LORA else None
            for index, width in enumerate(widths if role == "lora_B" else [whole]):
                shape = (ahead + sum(own or [per_slot] * num_slots), width)
                end = f".{index}" if width < whole else ""
                stacks.append(Stack(f"{name}{end}", role, shape, per_slot, ahead, left, own))  # type: ignore[arg-type]
                left += width
    return tuple(stacks)


def true_rows(
    layer: Layer, adapters: Sequence[Mapping[str, int]], spec: Spec
) -> tuple[int, ...] | None:
    """The rows that each adapter takes of a layer's stacks, in eights for alignment.

    None where all slots are to have room for any adapter of max_rank: a spec that gives slots,
    sites or max_rank asks for that.

    Args:
        adapters: the rank at every site, of each adapter in its slot's order.
    """
    if (spec.slots, spec.sites, spec.max_rank) != (None, None, None):
        return None
    sums = [sum(ranks.get(part.site, 0) for part in layer.slices) for ranks in adapters]
    return tuple(-(-rows // ROW_STEP) * ROW_STEP for rows in sums)


def _find_source(
    part: SliceSpec | LinearSpec | EmbeddingSpec,
    tensors: Mapping[str, TensorInfo] | None,
    where: str,
) -> SiteSource:
    """The tensors of one slice: names default to `<site>.weight` and `<site>.bias`."""
    bias = None if isinstance(part, EmbeddingSpec) else part.bias
    site = part.site or (part.weight or "").removesuffix(".weight")
    if tensors is None:
        if part.weight is not None or isinstance(bias, str):
            raise BaseModelError(f"{where}: names a tensor, but the base is `init`; give a path")
        return SiteSource(site or part.name, None, None, bool(bias))
    if not site:
        raise BaseModelError(f"{where}: give site or weight, so that the tensor can be found")
    weight = part.weight or f"{site}.weight"
    found_weight = (weight, _tensor(tensors, weight, where))
    if bias is False:
        return SiteSource(site, found_weight, None, False)
    bias_name = bias if isinstance(bias, str) else f"{site}.bias"
    if bias is None and bias_name not in tensors:
        return SiteSource(site, found_weight, None, False)
    found_bias = (bias_name, _tensor(tensors, bias_name, where))
    return SiteSource(site, found_weight, found_bias, True)


def _tensor(tensors: Mapping[str, TensorInfo], name: str, where: str) -> TensorInfo:
    if name in tensors:
        if tensors[name].dtype not in FLOAT_DTYPES:
            raise BaseModelError(
                f"{where}: tensor {name!r} is {tensors[name].dtype}; dequantize the base first"
            )
        return tensors[name]
    raise BaseModelError(
        f"{where}: the base has no tensor {name!r}; of its {len(tensors)} the closest are"
        f" {', '.join(_closest(name, tensors))}. Correct site or weight"
    )


def _closest(name: str, tensors: Iterable[str]) -> list[str]:
    """Three names that a user may have meant: the same with another prefix, or alike."""
    known = list(tensors)
    tail = name.split(".", 1)[-1]
    same_tail = [one for one in known if one.endswith(tail) or one.endswith("." + name)]
    return (same_tail or difflib.get_close_matches(name, known, 3, 0.6) or known)[:3]


def _sizes(
    source: SiteSource,
    in_features: int | None,
    out_features: int | None,
    transposed: bool,
    where: str,
) -> tuple[int, int]:
    """(in, out) of one slice, held to what the spec says and to the other slices."""
    if source.weight is None:
        if in_features is None or out_features is None:
            raise BaseModelError(f"{where}: with `init` both sizes must be given")
        return in_features, out_features
    name, info = source.weight
    if len(info.shape) != 2:
        raise BaseModelError(f"{where}: tensor {name!r} has shape {list(info.shape)}, not a matrix")
    found_in, found_out = info.shape if transposed else info.shape[::-1]
    for what, asked, found in (("in", in_features, found_in), ("out", out_features, found_out)):
        if asked is not None and asked != found:
            raise BaseModelError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}, so {found} {what}put"
                f" features; expected {asked}, by the spec or by the layer's other slices"
            )
    if source.bias is not None and source.bias[1].shape != (found_out,):
        raise BaseModelError(
            f"{where}: bias {source.bias[0]!r} has shape {list(source.bias[1].shape)};"
            f" expected [{found_out}]"
        )
    return found_in, found_out
