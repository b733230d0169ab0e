"""One adapter's weights for one layer -> the rows that fill its slot in the layer's stacks.

A slot's parameters at a site, and the base's where the adapter brings none:

    y = output_scale * (weight x) + bias + lora_B^T lora_A x
    lora_A = A,  lora_B = (output_scale * scaling B)^T,  bias = b + scaling b_B
"""

from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

from ..contract.manifest import PARAMETERS, Layer, Stack
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
    Where the layer has a stack for it, rank [1, 1]: the rows in use. The slices' blocks are then as
    high as their own ranks, so that all zeros come behind them.
    Embedding: `A^T [vocabulary, max_rank]`, one row per id.
    Where the layer has such stacks: output_scale [1, out], bias [1, out], weight [out, in], of an
    embedding [vocabulary, dim].

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
    closes_up, end = layer.stack("rank") is not None, 0
    own = [weights[part.site] for part in layer.slices if part.site in weights]
    for stack in layer.stacks:
        if stack.role in PARAMETERS and (own or stack.role != "weight"):
            values[stack.role] = base_rows[stack.name].astype(np.float64)
    for index, part in enumerate(layer.slices):
        columns = slice(part.offset, part.offset + part.width)
        brought = weights.get(part.site)
        if isinstance(brought, SavedWeights):
            _put_head(layer, values, brought, dtype)
        elif brought is not None:
            g = output_scales.get(part.site, np.ones(part.width)).astype(np.float64)
            first = end if closes_up else index * layer.max_rank
            end = first + brought.a.shape[0]
            rows = slice(first, end)
            a[rows] = brought.a
            with np.errstate(over="ignore", invalid="ignore"):  # refused below
                b[rows, columns] = brought.b.astype(np.float64).T * brought.scaling * scale * g
                _put_extras(layer, values, brought, scale, g, columns)
    packed = {}
    for stack in layer.stacks:
        if stack.role == "rank":
            packed[stack.name] = np.array([[end]])
            continue
        if stack.role not in values:  # as large as the base's own, which all share
            packed[stack.name] = base_rows[stack.name]
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            block = values[stack.role][:, stack.columns]
            packed[stack.name] = np.ascontiguousarray(block.astype(dtype))
        if not np.isfinite(packed[stack.name]).all():
            raise AdapterWeightsError(
                f"layer {layer.name!r}: {stack.role} overflows {dtype.name};"
                " export in bfloat16 or float32, or lower the adapter's scale"
            )
    return packed


def check_values(
    name: str,
    weights: Mapping[str, ModuleWeights],
    scale: float,
    dtype: np.dtype,
    output_scales: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Hold everything that an adapter brings to the graph's dtype, also where it has no slot yet.

    Args:
        output_scales: see `pack`.

    Raises:
        AdapterWeightsError: a value, or its product with the scalings, is not finite in `dtype`.
    """
    for site, brought in weights.items():
        g = (output_scales or {}).get(site, np.ones(1))
        for part, values in _scaled(brought, scale, g):
            with np.errstate(over="ignore", invalid="ignore"):
                is_finite = np.isfinite(values.astype(dtype)).all()
            if not is_finite:
                raise AdapterWeightsError(
                    f"adapter {name!r}: its {part} at site {site!r} overflows {dtype.name}; export"
                    " in bfloat16 or float32, or lower the adapter's scale"
                )


def _scaled(
    brought: ModuleWeights, scale: float, g: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """What of an adapter's values goes into stacks, in float64, by its name."""
    if isinstance(brought, SavedWeights):
        yield "weight", brought.weight
        if brought.bias is not None:
            yield "bias", brought.bias
        return
    factor = brought.scaling * scale
    yield "lora_A", brought.a
    with np.errstate(over="ignore", invalid="ignore"):
        yield "lora_B", (brought.b.astype(np.float64) * factor) * g.reshape(-1, 1)
    if brought.magnitude is not None:
        yield "output_scale", g
    bias = np.zeros(1) if brought.base_bias is None else brought.base_bias.astype(np.float64)
    if brought.lora_bias is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            bias = bias + brought.lora_bias.astype(np.float64) * factor
    yield "bias", bias


def _put_extras(
    layer: Layer,
    values: Mapping[str, np.ndarray],
    lora: LoraWeights,
    scale: float,
    g: np.ndarray,
    columns: slice,
) -> None:
    """output_scale = g, or weight = g W where the layer has whole weights; bias = b + s b_B."""
    if lora.magnitude is not None:
        if "weight" in values:
            values["weight"][:] *= g if layer.kind == "embedding" else g[:, None]
        else:
            values["output_scale"][0, columns] = g
    if lora.base_bias is not None:
        values["bias"][0, columns] = lora.base_bias
    if lora.lora_bias is not None:
        values["bias"][0, columns] += lora.lora_bias.astype(np.float64) * lora.scaling * scale


def _put_head(
    layer: Layer, values: Mapping[str, np.ndarray], head: SavedWeights, dtype: np.dtype
) -> None:
    """A whole weight; the outputs that a narrower head lacks get weight 0 and the lowest bias."""
    if layer.kind == "embedding":
        values["weight"][:] = head.weight
        return
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
        if stack.role in PARAMETERS:
            array[:] = np.tile(base_rows, (stack.shape[0] // stack.row_offset, 1))
    for slot, packed in blocks.items():
        array[stack.rows(slot)] = packed[stack.name]
    return array
