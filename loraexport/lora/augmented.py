"""`augmented`: as masked, then one product for base and expand together.

y = [x | where(own, x A^T, 0)] [W^T ; B]: no second pass over y. The stack holds W^T in its first
`in` rows, so no other copy of W is needed. A single layer's stack holds the bias too, below W^T in
a row among 8 (the others zero, for alignment), which a column of ones takes along. Slices
may have a product each over the one [x | h], each with a stack of its own columns: so nothing has
to be split afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .masked import Masked
from .strategy import Base, Routing, Sizes


class BaseExpand(nn.Module):
    """y = [x | h] [W^T ; B], or [x | 1 | h] with the bias in the stack; of each slice."""

    def forward(self, parts: list[Tensor], weights_b: Sequence[Tensor]) -> list[Tensor]:
        """parts [T, …] or [batch, n, …], together as wide as each of weights_b
        [in + 8 + S * W, width] has rows -> [T, width] each, or [batch, n, width]."""
        both = torch.cat(parts, dim=-1)
        return [both @ weight_b for weight_b in weights_b]


class Augmented(Masked):
    """See the module's formula; routing as in Masked. An embedding has no such product."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.base_expand = BaseExpand()

    def linear(self, x: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        assert base.bias is None, "it is in the stack, or added behind the product"
        _, own, ones = routing
        h = self.shrink_own(x, own, a)
        has_bias = b.shape[0] > x.shape[1] + a.shape[0]
        y: Tensor = self.base_expand([x, ones, h] if has_bias else [x, h], [b])[0]
        return y

    def slices(self, x: Tensor, own: Tensor, a: Tensor, bs: Sequence[Tensor]) -> list[Tensor]:
        """As `linear` without a bias, of slices whose stacks lie apart: bs [in + S * W, width] ->
        [T, width] each. x, own and y may have a dimension more, [batch, n, …]."""
        h = self.shrink_own(x, own, a)
        ys: list[Tensor] = self.base_expand([x, h], bs)
        return ys

    def embedding(self, ids: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError("the plan gives embeddings another strategy")
