"""`augmented`: as masked, then one product for base and expand together.

y = [x | where(own, x A^T, 0)] [W^T ; B]: no second pass over y. The stack holds W^T in its first
`in` rows, so no other copy of W is needed. It may hold the bias too, below W^T in a row among 8
(the others zero, for alignment): then h has 8 columns more, the first of them ones, which come
where h is not a token's own. Slices may have a product each over the one [x | h], each with a stack
of its own columns: so nothing has to be split afterwards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .masked import Masked
from .strategy import Routing, SiteBase, StackSizes


class BaseExpand(nn.Module):
    """y = [x | h] [W^T ; B] of each slice."""

    def forward(self, x: Tensor, h: Tensor, weights_b: Sequence[Tensor]) -> list[Tensor]:
        """x [T, in], h [T, S * W], or both [batch, n, …]; weights_b [in + S * W, width] each ->
        [T, width] each, or [batch, n, width]."""
        both = torch.cat([x, h], dim=-1)
        return [both @ weight_b for weight_b in weights_b]


class Augmented(Masked):
    """See the module's formula; routing as in Masked. An embedding has no such product."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__(sizes)
        self.base_expand = BaseExpand()

    def linear(self, x: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        assert base.bias is None, "it is in the stack, or added behind the product"
        return self.slices(x, routing, a, [b])[0]

    def slices(self, x: Tensor, routing: Routing, a: Tensor, bs: Sequence[Tensor]) -> list[Tensor]:
        """As `linear`, of slices whose stacks lie apart: bs [in + S * W, width] -> [T, width] each.
        x, the routing and y may have a dimension more, [batch, n, …]."""
        ys: list[Tensor] = self.base_expand(x, self.shrink_own(x, routing, a), bs)
        return ys

    def embedding(
        self, ids: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor
    ) -> Tensor:
        raise NotImplementedError("the plan gives embeddings another strategy")
