"""`augmented`: as masked, then one product for base and expand together.

y = [x | where(own, x A^T, 0)] [W^T ; B] + b: no second pass over y. The stack holds W^T in its
first `in` rows, so no other copy of W is needed. A single layer's stack holds the bias too, below
W^T in a row among 8 (the others zero, for alignment), which a column of ones takes along.
"""

import torch
from torch import Tensor, nn

from .masked import Masked
from .strategy import Base, Routing, Sizes


class BaseExpand(nn.Module):
    """y = [x | h] [W^T ; B] + bias, or [x | 1 | h] with the bias in the stack."""

    def forward(self, parts: list[Tensor], weight_b: Tensor, bias: Tensor | None) -> Tensor:
        """parts [T, …], together as wide as weight_b [in + 8 + S * W, out] has rows -> [T, out]."""
        both = torch.cat(parts, dim=1)
        return both @ weight_b if bias is None else torch.addmm(bias, both, weight_b)


class Augmented(Masked):
    """See the module's formula; routing as in Masked. An embedding has no such product."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.base_expand = BaseExpand()

    def linear(self, x: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        _, own, ones = routing
        h = self.select(self.shrink(x, a), own)
        has_bias = b.shape[0] > x.shape[1] + a.shape[0]
        return self.base_expand([x, ones, h] if has_bias else [x, h], b, base.bias)

    def embedding(self, ids: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError("the plan gives embeddings another strategy")
