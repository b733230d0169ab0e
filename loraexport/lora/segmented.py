"""`segmented`: slot by slot, each on its own tokens only. Two forms of one idea.

`SegmentedLoop` is the seed, SGLang's torch-native LoRA backend: segment metadata on the CPU, so no
device-to-host sync; shrink one addmm(beta=0, alpha=scaling) into a preallocated buffer, expand one
in-place addmm(beta=1) into the base output per segment and slice; true ranks; empty segments and
slot 0 skipped. Eager torch and TorchScript run it.

`Segmented` is its ONNX form: a graph has no host loop, so the slots are unrolled, each on the rows
that are its own, with Gemm for both products.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import List  # noqa: UP035  TorchScript reads this annotation

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraexport_runtime.adapters.tensors import LoraWeights
from loraexport_runtime.contract.manifest import Layer
from loraexport_runtime.errors import AdapterWeightsError

from ..tensors import to_torch
from .segments import TokenSlots
from .strategy import Expand, Gather, LoraStrategy, Routing, Shrink, SiteBase, StackSizes


def add_segmented_lora(
    y: Tensor,
    x: Tensor,
    seg_indptr: Tensor,
    seg_slots: Tensor,
    a: Tensor,
    b: List[Tensor],  # noqa: UP006
    a_indptr: List[int],  # noqa: UP006
    b_starts: List[int],  # noqa: UP006
    ranks: List[int],  # noqa: UP006
    columns: List[int],  # noqa: UP006
    scalings: List[float],  # noqa: UP006
    is_embedding: bool,
) -> Tensor:
    """y[t, slice] += scaling[s] * B[s, slice] (A[s, slice] x[t]), in place, segment by segment.

    Plain Python that TorchScript compiles as it stands. K slices; slot s is i = s - 1 in the lists.

    Args:
        y: [T, out], the base output, which is changed.
        x: [T, in], or ids int64 [T] for an embedding.
        seg_indptr, seg_slots: int64 [n + 1] and [n], on the CPU.
        a: [sum of ranks, in], slot by slot and in a slot slice by slice.
        b: per slice [sum of ranks, width], slot by slot: B^T without its scaling.
        a_indptr: [S + 1], slot i owns rows a_indptr[i] to a_indptr[i + 1] of a.
        b_starts, ranks: [S * K], for slot i and slice k at i * K + k; rank 0: not adapted.
        columns: [K + 1], where the slices begin in y.
        scalings: [S].

    Returns:
        y.

    Source: SGLang, srt/lora/backend/torch_backend.py.
    """
    bounds: List[int] = seg_indptr.tolist()  # noqa: UP006
    slots: List[int] = seg_slots.tolist()  # noqa: UP006
    widest = 0
    for i in range(len(scalings)):
        widest = max(widest, a_indptr[i + 1] - a_indptr[i])
    buffer = torch.empty([x.shape[0] * widest], dtype=y.dtype, device=y.device)
    for segment in range(len(slots)):
        start = bounds[segment]
        end = bounds[segment + 1]
        i = slots[segment] - 1
        if i >= 0 and end > start and a_indptr[i + 1] > a_indptr[i]:
            total = a_indptr[i + 1] - a_indptr[i]
            factor = a[a_indptr[i] : a_indptr[i + 1]].t()
            alpha = 1.0
            if is_embedding:
                h = factor.index_select(0, x[start:end])
                alpha = scalings[i]
            else:
                h = buffer[: (end - start) * total].view(end - start, total)
                torch.addmm(h, x[start:end], factor, beta=0.0, alpha=scalings[i], out=h)
            at = 0
            for k in range(len(b)):
                rank = ranks[i * len(b) + k]
                if rank > 0:
                    first = b_starts[i * len(b) + k]
                    y[start:end, columns[k] : columns[k + 1]].addmm_(
                        h[:, at : at + rank], b[k][first : first + rank], beta=1.0, alpha=alpha
                    )
                at += rank
    return y


@dataclass(frozen=True)
class _Packed:
    a: np.ndarray
    b: list[np.ndarray]
    a_indptr: list[int]
    b_starts: list[int]
    ranks: list[int]
    scalings: list[float]


class SegmentedLoop(nn.Module):
    """The seed's loop over one layer's adapters, at their true ranks."""

    def __init__(
        self,
        layer: Layer,
        slots: Mapping[int, tuple[Mapping[str, LoraWeights], float]],
        num_slots: int,
        dtype: np.dtype,
    ) -> None:
        """
        Args:
            slots: slot -> (weights by site, the spec's scale).
        """
        super().__init__()
        packed = _pack_true_ranks(layer, slots, num_slots, dtype)
        self.register_buffer("a", to_torch(packed.a))
        self.a: Tensor
        for k, part in enumerate(packed.b):
            self.register_buffer(f"b{k}", to_torch(part))
        self.num_slices = len(packed.b)
        self.a_indptr, self.b_starts = packed.a_indptr, packed.b_starts
        self.ranks = packed.ranks
        # A list of floats: as a tensor, `.to(half)` would round the scalings too.
        self.scalings = packed.scalings
        self.columns = [part.offset for part in layer.slices] + [layer.out_features]
        self.is_embedding = layer.kind == "embedding"
        self.loop: Callable[..., Tensor] = add_segmented_lora

    def forward(self, y: Tensor, x: Tensor, seg_indptr: Tensor, seg_slots: Tensor) -> Tensor:
        """y [T, out]: the base output, changed in place; x [T, in] or ids [T]."""
        return self.loop(
            y,
            x,
            seg_indptr,
            seg_slots,
            self.a,
            [getattr(self, f"b{k}") for k in range(self.num_slices)],
            self.a_indptr,
            self.b_starts,
            self.ranks,
            self.columns,
            self.scalings,
            self.is_embedding,
        )


class SegmentedLayer(nn.Module):
    """A base and the loop over it: what the TorchScript artifact holds. Segments on the CPU."""

    def __init__(self, base: SiteBase, lora: SegmentedLoop) -> None:
        super().__init__()
        self.base = base
        self.lora = lora

    def forward(self, x: Tensor, seg_indptr: Tensor, seg_slots: Tensor) -> Tensor:
        """x [T, in] or ids [T], seg_indptr int64 [n + 1], seg_slots int64 [n] -> [T, out]."""
        y: Tensor = self.lora(self.base(x), x, seg_indptr, seg_slots)
        return y


def _pack_true_ranks(
    layer: Layer,
    slots: Mapping[int, tuple[Mapping[str, LoraWeights], float]],
    num_slots: int,
    dtype: np.dtype,
) -> _Packed:
    """One alpha serves a slot's whole shrink: a slice that differs has the ratio in its A."""
    a: list[np.ndarray] = [np.zeros((0, layer.in_features))]
    b: list[list[np.ndarray]] = [[np.zeros((0, part.width))] for part in layer.slices]
    a_indptr, b_starts, ranks, scalings = [0], [], [], []
    for slot in range(1, num_slots + 1):
        weights, scale = slots.get(slot, ({}, 1.0))
        used = [weights[part.site].scaling * scale for part in layer.slices if part.site in weights]
        alpha = max(used, key=abs, default=0.0)
        scalings.append(alpha)
        for part, blocks in zip(layer.slices, b, strict=True):
            b_starts.append(sum(map(len, blocks)))
            if part.site not in weights or alpha == 0.0:
                ranks.append(0)
                continue
            lora = weights[part.site]
            ranks.append(lora.a.shape[0])
            a.append(lora.a.astype(np.float64) * (lora.scaling * scale / alpha))
            blocks.append(lora.b.astype(np.float64).T)
        a_indptr.append(sum(map(len, a)))
    with np.errstate(over="ignore"):
        shrinks = np.concatenate(a).astype(dtype)
        joined = [np.concatenate(blocks).astype(dtype) for blocks in b]
    # B has no scaling here, so it may be too large where the product is not.
    if not all(np.isfinite(values).all() for values in (shrinks, *joined)):
        raise AdapterWeightsError(
            f"layer {layer.name!r}: a factor of an adapter overflows {dtype.name} without its"
            " scaling; export in bfloat16 or float32"
        )
    return _Packed(shrinks, joined, a_indptr, b_starts, ranks, scalings)


class OwnRows(nn.Module):
    """The tokens of one slot, in order."""

    def forward(self, slots: Tensor, slot: int) -> Tensor:
        """slots int64 [T] -> int64 [number of tokens of that slot]."""
        return torch.nonzero(slots == slot).squeeze(1)


class Reorder(nn.Module):
    """Put rows that were sorted by slot back into the order of the tokens."""

    def forward(self, parts: list[Tensor], rows: list[Tensor], num_tokens: int) -> Tensor:
        """parts, one per slot, [tokens of the slot, n], rows their tokens -> [T, n]."""
        tokens = torch.cat(rows)
        places = torch.arange(num_tokens, device=tokens.device)
        place_of = torch.zeros_like(places).scatter(0, tokens, places)
        return torch.cat(parts).index_select(0, place_of)


class Segmented(LoraStrategy):
    """The ONNX form: for each slot s, y[rows] = y[rows] + (x[rows] A[s]^T) B[s].

    Routing: (slots int64 [T],). StackSizes depend on values, so CUDA graphs cannot capture it.
    """

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__(sizes)
        self.slots = TokenSlots()
        self.rows = OwnRows()
        self.gather = Gather(sizes.in_features)
        self.shrink = Shrink()
        self.expand = Expand()
        self.reorder = Reorder()

    def route(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Routing:
        return (self.slots(seg_indptr, seg_slots, num_tokens),)

    def linear(self, x: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        def shrink(rows: Tensor, block: slice) -> Tensor:
            return self.shrink(x.index_select(0, rows), a[block])

        return self._slot_by_slot(base(x), routing[0], b, shrink)

    def embedding(
        self, ids: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor
    ) -> Tensor:
        h = self.gather(ids, routing[0], a)
        return self._slot_by_slot(base(ids), routing[0], b, lambda rows, _: F.embedding(rows, h))

    def _slot_by_slot(
        self, y: Tensor, slots: Tensor, b: Tensor, shrink: Callable[[Tensor, slice], Tensor]
    ) -> Tensor:
        rows = [self.rows(slots, slot) for slot in range(self.num_slots + 1)]
        parts = [y.index_select(0, rows[0])]
        for i, tokens in enumerate(rows[1:]):
            block = slice(i * self.rows_per_slot, (i + 1) * self.rows_per_slot)
            parts.append(self.expand(y.index_select(0, tokens), shrink(tokens, block), b[block]))
        return self.reorder(parts, rows, y.shape[0])
