"""`augmented`: as masked, then one product for base and expand together.

y = [x | where(own, x A^T, 0)] [W^T ; B] + b: no second pass over y. The stack b holds W^T in its
first `in` rows, so no other copy of W is needed.
"""

import torch
from torch import Tensor, nn

from .masked import Masked
from .strategy import Base, Routing


class BaseExpand(nn.Module):
    """y = [x | h] [W^T ; B] + bias."""

    def forward(self, x: Tensor, h: Tensor, weight_b: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, in], h [T, S * W], weight_b [in + S * W, out], bias [out] -> [T, out]."""
        both = torch.cat([x, h], dim=1)
        if bias is None:
            return both @ weight_b
        return torch.addmm(bias, both, weight_b)


class Augmented(Masked):
    """See the module's formula; routing as in Masked. An embedding has no such product."""

    def __init__(self, num_slots: int, rows_per_slot: int, in_features: int) -> None:
        super().__init__(num_slots, rows_per_slot, in_features)
        self.base_expand = BaseExpand()

    def linear(self, x: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        _, own = routing
        return self.base_expand(x, self.select(self.shrink(x, a), own), b, base.bias)

    def embedding(self, ids: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        raise NotImplementedError("the plan gives embeddings another strategy")
