"""One adapter's weights for one layer -> the rows that fill its slot in the layer's stacks.

A slot's parameters at a site, and the base's where the adapter brings none:

    y = output_scale * (weight x) + bias + lora_B^T lora_A x
    lora_A = A,  lora_B = (output_scale * scaling B)^T,  bias = b + scaling b_B
"""

from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from ..contract.manifest import Layer, Slice, Stack
from ..errors import AdapterWeightsError
from .header import AdapterHeader, LoraWeights, ModuleWeights, SavedWeights


def check_fit(header: AdapterHeader, sites: Mapping[str, str], layers: Sequence[Layer]) -> None:
    """Compare an adapter's shapes, ranks and features with the layers that have its sites.

    `sites` is site -> module, from `match_sites`. Raises AdapterWeightsError at the first site
    that differs.
    """
    for layer in layers:
        for part in layer.slices:
            if part.site in sites:
                _check_site(header, sites[part.site], layer, part)
        missing = [part.site for part in layer.slices if sites.get(part.site) not in header.saved]
        if not layer.in_base and missing:
            raise AdapterWeightsError(
                f"{header.path}: it brings no {missing[0]!r}, and the base has none of its own;"
                f" train it with modules_to_save=[{missing[0]!r}]"
            )


def _check_site(header: AdapterHeader, name: str, layer: Layer, part: Slice) -> None:
    where = f"{header.path}: module {name!r}"
    saved = header.saved.get(name)
    if saved is not None:
        if layer.kind == "embedding":
            raise AdapterWeightsError(
                f"{where} is an embedding that was trained whole; only linear layers can differ by"
                " row. Retrain it with LoRA on the embedding, or merge it into a base of its own"
            )
        if layer.stack("weight") is None:
            raise AdapterWeightsError(_missing_feature(where, "was trained whole", "heads"))
        # Narrower heads are padded; layers inside a head are as the base has them.
        narrower = layer.labels and saved.out_features < part.width
        fits = saved.out_features == part.width or narrower
        if saved.in_features != layer.in_features or not fits:
            raise AdapterWeightsError(
                f"{where} maps {saved.in_features} to {saved.out_features} features, but site"
                f" {part.site!r} maps {layer.in_features} to {part.width}; the adapter belongs to"
                " another base, or needs a build with an adapter whose head is as wide. Only labels"
                " may be fewer, and not where rows blend (export.blend)"
            )
        return
    module = header.modules[name]
    if module.is_embedding != (layer.kind == "embedding"):
        kind = "an embedding" if module.is_embedding else "a linear"
        raise AdapterWeightsError(
            f"{where} is {kind} LoRA, but layer {layer.name!r} is of kind {layer.kind};"
            f" the adapter belongs to {_other_base(header)}"
        )
    if (module.in_features, module.out_features) != (layer.in_features, part.width):
        raise AdapterWeightsError(
            f"{where} maps {module.in_features} to {module.out_features} features, but site"
            f" {part.site!r} maps {layer.in_features} to {part.width};"
            f" the adapter belongs to {_other_base(header)}"
            + (", or its head has fewer labels than another's here" if layer.labels else "")
        )
    if module.rank > layer.max_rank:
        raise AdapterWeightsError(
            f"{where} has rank {module.rank}, above max_rank {layer.max_rank};"
            f" set max_rank: {module.rank} in the spec and build again"
        )
    if layer.stack("lora_A") is None:
        raise AdapterWeightsError(
            f"{where} is LoRA, but site {part.site!r} has room for whole weights only; name it in"
            " the spec's sites and build again"
        )
    has_bias = module.lora_bias is not None or module.base_bias is not None
    if module.magnitude is not None and not _takes(layer, "output_scale"):
        raise AdapterWeightsError(_missing_feature(where, "uses DoRA", "dora"))
    if has_bias and layer.stack("bias") is None:
        raise AdapterWeightsError(_missing_feature(where, "brings a bias", "bias"))


def _other_base(header: AdapterHeader) -> str:
    named = f", and its config names {header.base_model!r}" if header.base_model else ""
    return f"another base{named}"


def _takes(layer: Layer, role: str) -> bool:
    """Whole weights hold a scale too: it is multiplied in."""
    return layer.stack(role) is not None or layer.stack("weight") is not None


def _missing_feature(where: str, brings: str, feature: str) -> str:
    return (
        f"{where} {brings}, for which this artifact has no place; add {feature} to features in the"
        " spec (whole models only) and build again"
    )


def pack(
    layer: Layer,
    weights: Mapping[str, ModuleWeights],
    scale: float,
    dtype: np.dtype,
    base_rows: Mapping[str, np.ndarray] | None = None,
    output_scales: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """The rows of one slot, by stack name; zero or the base's own where the adapter brings none.

    Linear: `A [slices * max_rank, in]`, one block per slice, and `scaling * B^T
    [slices * max_rank, out]`, each slice's block in its own columns, so that `x A^T B` adds every
    slice's `scaling B_k (A_k x)` at once; a stack that lies beside others gets its columns of it.
    Embedding: `A^T [vocabulary, max_rank]`, one row per id.
    Where the layer has such stacks: output_scale [1, out], bias [1, out], weight [out, in].

    Args:
        weights: by site.
        scale: multiplies every scaling (the spec's `scale`).
        dtype: of the graph; every value is made in float64 and rounded once.
        base_rows: the base's rows by stack name, for the stacks that replace a parameter.
        output_scales: g by site, for sites where the adapter uses DoRA (see dora.py).

    Raises:
        AdapterWeightsError: a value is not finite in `dtype`.
    """
    base_rows, output_scales = base_rows or {}, output_scales or {}
    a = np.zeros((len(layer.slices) * layer.max_rank, layer.in_features), dtype=np.float64)
    b = np.zeros((len(layer.slices) * layer.max_rank, layer.out_features), dtype=np.float64)
    values = {"lora_A": a.T if layer.kind == "embedding" else a, "lora_B": b}
    for stack in layer.stacks:
        if stack.role in ("output_scale", "bias", "weight"):
            values[stack.role] = base_rows[stack.name].astype(np.float64)
    for index, part in enumerate(layer.slices):
        columns = slice(part.offset, part.offset + part.width)
        brought = weights.get(part.site)
        if isinstance(brought, SavedWeights):
            _put_head(values, brought, dtype)
        elif brought is not None:
            g = output_scales.get(part.site, np.ones(part.width)).astype(np.float64)
            rows = slice(index * layer.max_rank, index * layer.max_rank + brought.a.shape[0])
            a[rows] = brought.a
            b[rows, columns] = brought.b.astype(np.float64).T * brought.scaling * scale * g
            _put_extras(values, brought, scale, g, columns)
    packed = {}
    for stack in layer.stacks:
        with np.errstate(over="ignore"):
            own = values[stack.role][:, stack.columns]
            packed[stack.name] = np.ascontiguousarray(own.astype(dtype))
        if not np.isfinite(packed[stack.name]).all():
            raise AdapterWeightsError(
                f"layer {layer.name!r}: {stack.role} overflows {dtype.name};"
                " export in bfloat16 or float32, or lower the adapter's scale"
            )
    return packed


def _put_extras(
    values: Mapping[str, np.ndarray],
    lora: LoraWeights,
    scale: float,
    g: np.ndarray,
    columns: slice,
) -> None:
    """output_scale = g, or weight = g W where the layer has whole weights; bias = b + s b_B."""
    if lora.magnitude is not None:
        if "weight" in values:
            values["weight"][:] *= g[:, None]
        else:
            values["output_scale"][0, columns] = g
    if lora.base_bias is not None:
        values["bias"][0, columns] = lora.base_bias
    if lora.lora_bias is not None:
        values["bias"][0, columns] += lora.lora_bias.astype(np.float64) * lora.scaling * scale


def _put_head(values: Mapping[str, np.ndarray], head: SavedWeights, dtype: np.dtype) -> None:
    """A whole weight; the outputs that a narrower head lacks get weight 0 and the lowest bias."""
    width = head.weight.shape[0]
    values["weight"][:] = 0
    values["weight"][:width] = head.weight
    values["bias"][:] = lowest(dtype)
    values["bias"][0, :width] = 0 if head.bias is None else head.bias


def lowest(dtype: np.dtype) -> float:
    """The logit of a label that a head does not have: softmax gives it 0, argmax never takes it."""
    return float(ml_dtypes.finfo(dtype).min)  # type: ignore[no-untyped-call]


def assemble(
    stack: Stack,
    dtype: np.dtype,
    base_rows: np.ndarray | None,
    blocks: Mapping[int, Mapping[str, np.ndarray]],
) -> np.ndarray:
    """A whole stack: the base's rows if it has any, then each slot's block from `pack`.

    Args:
        base_rows: the `row_offset` rows of the base, or None where there are none.
        blocks: slot -> what `pack` gave for it; slots that are missing stay zero, or as the base.
    """
    array = np.zeros(stack.shape, dtype)
    if base_rows is not None:
        array[: stack.row_offset] = base_rows
        if stack.role in ("output_scale", "bias", "weight"):
            array[:] = np.tile(base_rows, (stack.shape[0] // stack.row_offset, 1))
    for slot, packed in blocks.items():
        array[stack.rows(slot)] = packed[stack.name]
    return array
