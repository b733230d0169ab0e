"""One adapter's weights for one layer -> the rows that fill its slot in the layer's stacks."""

from collections.abc import Mapping, Sequence

import numpy as np

from .adapters import AdapterHeader, LoraWeights
from .errors import AdapterWeightsError
from .manifest import Layer, Stack


def check_fit(header: AdapterHeader, sites: Mapping[str, str], layers: Sequence[Layer]) -> None:
    """Compare an adapter's shapes and ranks with the layers that have its sites.

    `sites` is site -> module, from `match_sites`. Raises AdapterWeightsError at the first site
    that differs.
    """
    for layer in layers:
        for part in layer.slices:
            if part.site not in sites:
                continue
            module = header.modules[sites[part.site]]
            where = f"{header.path}: module {sites[part.site]!r}"
            if module.is_embedding != (layer.kind == "embedding"):
                kind = "an embedding" if module.is_embedding else "a linear"
                raise AdapterWeightsError(
                    f"{where} is {kind} LoRA, but layer {layer.name!r} is of kind {layer.kind};"
                    " the adapter belongs to another base"
                )
            if (module.in_features, module.out_features) != (layer.in_features, part.width):
                raise AdapterWeightsError(
                    f"{where} maps {module.in_features} to {module.out_features} features, but site"
                    f" {part.site!r} maps {layer.in_features} to {part.width};"
                    " the adapter belongs to another base"
                )
            if module.rank > layer.max_rank:
                raise AdapterWeightsError(
                    f"{where} has rank {module.rank}, above max_rank {layer.max_rank};"
                    f" set max_rank: {module.rank} in the spec and build again"
                )


def pack(
    layer: Layer, weights: Mapping[str, LoraWeights], scale: float, dtype: np.dtype
) -> dict[str, np.ndarray]:
    """The rows of one slot, by stack name: zero where the adapter leaves a site alone.

    Linear: `A [slices * max_rank, in]`, one block per slice, and `scaling * B^T
    [slices * max_rank, out]`, each slice's block in its own columns, so that `x A^T B` adds every
    slice's `scaling B_k (A_k x)` at once. Embedding: `A^T [vocabulary, max_rank]`, one row per id.

    Args:
        weights: by site.
        scale: multiplies every scaling (the spec's `scale`).
        dtype: of the graph; B is scaled in float64 and rounded once.

    Raises:
        AdapterWeightsError: a value is not finite in `dtype`.
    """
    stack_a = np.zeros((len(layer.slices) * layer.max_rank, layer.in_features), dtype=np.float64)
    stack_b = np.zeros((len(layer.slices) * layer.max_rank, layer.out_features), dtype=np.float64)
    for index, part in enumerate(layer.slices):
        if part.site not in weights:
            continue
        lora = weights[part.site]
        rows = slice(index * layer.max_rank, index * layer.max_rank + lora.a.shape[0])
        stack_a[rows] = lora.a
        stack_b[rows, part.offset : part.offset + part.width] = (
            lora.b.astype(np.float64).T * lora.scaling * scale
        )
    blocks = {"lora_A": stack_a.T if layer.kind == "embedding" else stack_a, "lora_B": stack_b}
    packed = {}
    for stack in layer.stacks:
        with np.errstate(over="ignore"):
            packed[stack.name] = np.ascontiguousarray(blocks[stack.role].astype(dtype))
        if not np.isfinite(packed[stack.name]).all():
            raise AdapterWeightsError(
                f"layer {layer.name!r}: {stack.role} overflows {dtype.name};"
                " export in bfloat16 or float32, or lower the adapter's scale"
            )
    return packed


def assemble(
    stack: Stack,
    dtype: np.dtype,
    base_rows: np.ndarray | None,
    blocks: Mapping[int, Mapping[str, np.ndarray]],
) -> np.ndarray:
    """A whole stack: the base's rows if it has any, then each slot's block from `pack`.

    Args:
        base_rows: `W^T [in, out]` for an augmented stack, else None.
        blocks: slot -> what `pack` gave for it; slots that are missing stay zero.
    """
    array = np.zeros(stack.shape, dtype)
    if base_rows is not None:
        array[: stack.row_offset] = base_rows
    for slot, packed in blocks.items():
        array[stack.rows(slot)] = packed[stack.name]
    return array
