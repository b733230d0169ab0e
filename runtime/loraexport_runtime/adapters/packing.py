"""One adapter's weights for one layer -> the rows that fill its slot in the layer's stacks.

A slot's parameters at a site, and the base's where the adapter brings none:

    y = output_scale * (weight x) + bias + lora_B^T lora_A x
    lora_A = A,  lora_B = (output_scale * scaling B)^T,  bias = b + scaling b_B
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from ..contract.manifest import Layer, Stack
from ..errors import AdapterWeightsError
from .tensors import LoraWeights, ModuleWeights, SavedWeights


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
