"""The interface that the four strategies share, and the products that most of them use.

Shapes: T tokens, S slots, W = stack rows per slot (slices x max_rank), `in`, `out` features.
Stacks: a [S * W, in] (embedding: [S * vocabulary, W]), b [S * W, out]; scaling lives in b.
Slot s, counted from 1, owns the block s - 1 of whole rows; slot 0 is the base and has none.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, addmm, nn

from loraexport_runtime.contract.manifest import Layer

Routing = tuple[Tensor, ...]
"""What a strategy derives from the segments, once for all layers that share them."""


@dataclass(frozen=True)
class StackSizes:
    """What a strategy knows of its layer and its stacks."""

    num_slots: int
    rows_per_slot: int
    in_features: int
    dtype: torch.dtype
    """Of x and of the stacks."""
    has_bias: bool
    """Whether the stacks begin with rows for the base's bias (augmented)."""

    @classmethod
    def of(cls, layer: Layer, num_slots: int, dtype: torch.dtype) -> "StackSizes":
        a, rows = layer.stack("lora_A"), len(layer.slices) * layer.max_rank
        assert a is not None, "a strategy is for layers with LoRA"
        has_bias = layer.strategy == "augmented" and a.row_offset > 0
        return cls(num_slots, rows, layer.in_features, dtype, has_bias)


class SiteBase(nn.Module):
    """W x + b, or E[ids] for an embedding. The augmented strategy keeps W in its stack."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.weight: Tensor | None
        self.bias: Tensor | None


class LinearBase(SiteBase):
    """y = x W^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]; weight [out, in], bias [out]."""
        assert self.weight is not None, "this strategy keeps W in its stack"
        return F.linear(x, self.weight, self.bias)


class EmbeddingBase(SiteBase):
    """y = E[ids]."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [T] -> [T, dim]; weight [vocabulary, dim]."""
        assert self.weight is not None, "an embedding always has its weight"
        return F.embedding(ids, self.weight)


class LoraStrategy(nn.Module):
    """How a mixed batch is computed: `route` once per batch, then any number of layers."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.num_slots = sizes.num_slots
        self.rows_per_slot = sizes.rows_per_slot
        self.in_features = sizes.in_features
        self.has_bias = sizes.has_bias

    def route(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Routing:
        """From segments: seg_indptr int64 [n + 1], seg_slots int64 [n]."""
        raise NotImplementedError

    def route_rows(self, slots: Tensor, per_row: int) -> Routing:
        """From rows of `per_row` tokens each: slots int64 [batch]."""
        bounds = torch.arange(slots.shape[0] + 1, device=slots.device) * per_row
        return self.route(bounds, slots, slots.shape[0] * per_row)

    def linear(self, x: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError

    def embedding(
        self, ids: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor
    ) -> Tensor:
        raise NotImplementedError


class Shrink(nn.Module):
    """h = x A^T, for the A of all slots at once."""

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        """x [T, in], a [S * W, in] -> [T, S * W]."""
        return F.linear(x, a)


class Gather(nn.Module):
    """h[t] = A[s]^T[ids[t]], the shrink of an embedding: a row of the token's own slot.

    Tokens of slot 0 get a row of slot 1, which the caller must not let through.
    """

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def forward(self, ids: Tensor, slots: Tensor, a: Tensor) -> Tensor:
        """ids, slots int64 [T], a [S * vocabulary, W] -> [T, W]."""
        rows = (slots - 1).clamp(min=0) * self.vocabulary + ids
        return F.embedding(rows, a)


class Expand(nn.Module):
    """y + h B; of matrices as one fused product."""

    def forward(self, y: Tensor, h: Tensor, b: Tensor) -> Tensor:
        """y [T, out], h [T, S * W], b [S * W, out] -> [T, out]; or y and h [batch, n, …]."""
        return addmm(y, h, b) if h.dim() == 2 else y + h @ b
