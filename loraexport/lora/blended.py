"""`masked` for rows that blend slots: y = (x W^T + b) + where(w != 0, w x A^T, 0) B."""

import torch
from torch import Tensor, nn

from .masked import Masked
from .strategy import Routing, SiteBase, StackSizes


class Weigh(nn.Module):
    """w h where w is not 0, else 0: another slot's inf is not multiplied."""

    def forward(self, h: Tensor, weights: Tensor) -> Tensor:
        """h, weights [T, S * W] -> [T, S * W]."""
        zero = torch.zeros((), dtype=h.dtype, device=h.device)
        return torch.where(weights != 0, h * weights, zero)


class Blended(Masked):
    """See the module's formula. Routing: (weights of the stack's columns [T, S * W],)."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__(sizes)
        self.weigh = Weigh()

    def route_rows(self, slots: Tensor, per_row: int) -> Routing:
        """slots: the weight of every slot instead, float [batch, S]."""
        per_token = slots.unsqueeze(1).expand(-1, per_row, -1).flatten(0, 1)
        columns = per_token.unsqueeze(2).expand(-1, -1, self.rows_per_slot)
        return (columns.flatten(1),)

    def shrink_own(self, x: Tensor, routing: Routing, a: Tensor) -> Tensor:
        """h = where(w != 0, w x A^T, 0)."""
        h: Tensor = self.weigh(self.shrink(x, a), routing[0])
        return h

    def embedding(
        self, ids: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor
    ) -> Tensor:
        slots = torch.arange(1, self.num_slots + 1, device=ids.device).repeat(ids.shape[0], 1)
        every = ids.unsqueeze(1).expand_as(slots)
        h = self.gather(every.flatten(), slots.flatten(), a).view(ids.shape[0], -1)
        return self.expand(base(ids), self.weigh(h, routing[0]), b)
