"""`masked`: one shrink and one expand for all slots; what is not a token's own is set to 0 between.

y = (x W^T + b) + where(own, x A^T, 0) B.  `own` selects and never multiplies: another slot's value
may be inf, and inf * 0 would be NaN.
"""

import torch
from torch import Tensor, nn

from loraexport_runtime.manifest import BIAS_ROWS

from .segments import TokenSlots
from .strategy import Base, Expand, Gather, Routing, Shrink, Sizes, Strategy


class Own(nn.Module):
    """own[t, j] = column j of the stack belongs to token t's slot."""

    def __init__(self, num_slots: int, rows_per_slot: int) -> None:
        super().__init__()
        owners = torch.arange(1, num_slots + 1).repeat_interleave(rows_per_slot)
        self.register_buffer("owners", owners.unsqueeze(0))
        self.owners: Tensor

    def forward(self, slots: Tensor) -> Tensor:
        """slots int64 [T] -> bool [T, S * W]."""
        return slots.unsqueeze(1) == self.owners


class Select(nn.Module):
    """h where own, else 0."""

    def forward(self, h: Tensor, own: Tensor) -> Tensor:
        """h [T, S * W], own bool [T, S * W] -> [T, S * W]."""
        return torch.where(own, h, torch.zeros((), dtype=h.dtype, device=h.device))


class Masked(Strategy):
    """See the module's formula.

    Routing: (slots int64 [T], own bool [T, S * W], ones [T, 8] for layers that are augmented).
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.slots = TokenSlots()
        self.own = Own(sizes.num_slots, sizes.rows_per_slot)
        self.shrink = Shrink()
        self.gather = Gather(sizes.in_features)
        self.select = Select()
        self.expand = Expand()

    def route(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Routing:
        return self._route_tokens(self.slots(seg_indptr, seg_slots, num_tokens))

    def route_rows(self, slots: Tensor, per_row: int) -> Routing:
        return self._route_tokens(slots.unsqueeze(1).expand(-1, per_row).flatten())

    def _route_tokens(self, slots: Tensor) -> Routing:
        ones = torch.ones(slots.shape[0], BIAS_ROWS, dtype=self.dtype, device=slots.device)
        return slots, self.own(slots), ones

    def shrink_own(self, x: Tensor, own: Tensor, a: Tensor) -> Tensor:
        """h = where(own, x A^T, 0)."""
        h: Tensor = self.select(self.shrink(x, a), own)
        return h

    def linear(self, x: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        return self.expand(base(x), self.shrink_own(x, routing[1], a), b)

    def embedding(self, ids: Tensor, base: Base, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        slots, own = routing[:2]
        h = self.gather(ids, slots, a).repeat(1, self.num_slots)
        return self.expand(base(ids), self.select(h, own), b)
