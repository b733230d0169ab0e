"""Single layers: where their tensors are. Headers alone are read."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from loraexport_runtime.adapters.header import AdapterHeader
from loraexport_runtime.adapters.tensor_files import FLOAT_DTYPES, TensorInfo
from loraexport_runtime.contract.kinds import Tag
from loraexport_runtime.contract.manifest import Layer, Slice
from loraexport_runtime.contract.naming import Naming

from ..errors import BaseModelError
from ..hf.checkpoint import read_checkpoint
from ..hf.names.naming import read_naming
from ..spec.schema import EmbeddingSpec, LayerSpec, LayersSpec, LinearSpec, SliceSpec, Spec
from .layer import LayerPlan, SiteSource, make_layer_plan, refuse_features


@dataclass(frozen=True)
class LayersPlan:
    """Single layers, whose sources say where their tensors are."""

    tag: ClassVar[Tag] = "layers"

    seed: int
    """Of synthetic weights; 0 where there are none."""
    naming: Naming


def plan_layers(
    base: LayersSpec,
    directory: Path | None,
    headers: Sequence[AdapterHeader],
    spec: Spec,
    num_slots: int,
    max_rank: int,
) -> tuple[tuple[LayerPlan, ...], LayersPlan]:
    """Plan the spec's layers, a graph each.

    Args:
        directory: of the checkpoint; None where a seed makes the weights.

    Raises:
        BaseModelError: a tensor is absent or misshapen, or two layers have one site.
        AdapterConfigError: an adapter brings more than A and B.
    """
    tensors = read_checkpoint(directory) if directory else None
    layers = tuple(_plan_layer(layer, tensors, spec, num_slots, max_rank) for layer in base.layers)
    _check_sites_differ(layers)
    instead = "build the whole model (base.kind: transformers)"
    refuse_features(headers, "the graph of a single layer", instead)
    sites = [part.site for layer in layers for part in layer.layer.slices]
    return layers, LayersPlan(
        base.init.seed if base.init else 0, read_naming(directory, sites, headers)
    )


def _plan_layer(
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
        out_features = part.embedding_dim if isinstance(part, EmbeddingSpec) else part.out_features
        transposed = isinstance(layer, EmbeddingSpec) or layer.fan_in_fan_out
        in_features, width = _sizes(source, in_features, out_features, transposed, where)
        slices.append(Slice(part.name, source.site, offset, width))
        sources.append(source)
        offset += width
    assert in_features is not None, "a layer has at least one slice, and that sets in_features"
    formats = spec.formats
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
    names = list(tensors)
    tail = name.split(".", 1)[-1]
    same_tail = [tensor for tensor in names if tensor.endswith(tail) or tensor.endswith("." + name)]
    return (same_tail or difflib.get_close_matches(name, names, 3, 0.6) or names)[:3]


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
    for side, expected, size in (("in", in_features, found_in), ("out", out_features, found_out)):
        if expected is not None and expected != size:
            raise BaseModelError(
                f"{where}: tensor {name!r} has shape {list(info.shape)}, so {size} {side}put"
                f" features; expected {expected}, by the spec or by the layer's other slices"
            )
    if source.bias is not None and source.bias[1].shape != (found_out,):
        raise BaseModelError(
            f"{where}: bias {source.bias[0]!r} has shape {list(source.bias[1].shape)};"
            f" expected [{found_out}]"
        )
    return found_in, found_out


def _check_sites_differ(layers: tuple[LayerPlan, ...]) -> None:
    seen: dict[str, str] = {}
    for plan in layers:
        for part in plan.layer.slices:
            if seen.get(part.site) == plan.layer.name:
                raise BaseModelError(
                    f"site {part.site!r} is twice in layer {plan.layer.name!r}; give each slice its"
                    " own site"
                )
            if part.site in seen:
                raise BaseModelError(
                    f"site {part.site!r} is in layer {seen[part.site]!r} and in"
                    f" {plan.layer.name!r}; a site belongs to one layer"
                )
            seen[part.site] = plan.layer.name
