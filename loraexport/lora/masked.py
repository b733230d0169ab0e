"""`masked`: one shrink and one expand for all slots; what is not a token's own is set to 0 between.

y = (x W^T + b) + where(own, x A^T, 0) B.  `own` selects and never multiplies: another slot's value
may be inf, and inf * 0 would be NaN.
"""

import torch
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import BIAS_ROWS

from .segments import TokenSlots
from .strategy import Expand, Gather, LoraStrategy, Routing, Shrink, SiteBase, StackSizes


class Own(nn.Module):
    """own[t, j] = column j of the stack belongs to token t's slot."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        owners = torch.arange(1, sizes.num_slots + 1)
        owners = owners.repeat_interleave(sizes.rows_per_slot)
        if sizes.has_bias:
            owners = torch.cat([torch.full((BIAS_ROWS,), -1), owners])  # nobody's: rest has a 1
        self.register_buffer("owners", owners.unsqueeze(0))
        self.owners: Tensor

    def forward(self, slots: Tensor) -> Tensor:
        """slots int64 [T] -> bool [T, S * W]; with a bias [T, 8 + S * W]."""
        return slots.unsqueeze(1) == self.owners


class Rest(nn.Module):
    """What h is where it is not a token's own: 0, but 1 in the bias's column."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        row = torch.zeros((), dtype=sizes.dtype)
        if sizes.has_bias:
            row = row.repeat(1, BIAS_ROWS + sizes.num_slots * sizes.rows_per_slot)
            row[0, 0] = 1
        self.register_buffer("row", row)
        self.row: Tensor

    def forward(self, slots: Tensor) -> Tensor:
        """slots int64 [T] -> a scalar; with a bias [T, 8 + S * W], which `where` reads fastest."""
        return self.row.expand(slots.shape[0], -1) if self.row.dim() else self.row


class Select(nn.Module):
    """h where own, else the rest."""

    def forward(self, h: Tensor, own: Tensor, rest: Tensor) -> Tensor:
        """h [T, S * W], own bool [T, S * W], rest [T, S * W] or a scalar -> [T, S * W]."""
        return torch.where(own, h, rest)


class Masked(LoraStrategy):
    """See the module's formula.

    Routing: (slots int64 [T], own bool [T, S * W], the rest, a scalar or [T, S * W]).
    """

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__(sizes)
        self.slots = TokenSlots()
        self.own = Own(sizes)
        self.rest = Rest(sizes)
        self.shrink = Shrink()
        self.gather = Gather(sizes.in_features)
        self.select = Select()
        self.expand = Expand()

    def route(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Routing:
        return self._route_tokens(self.slots(seg_indptr, seg_slots, num_tokens))

    def route_rows(self, slots: Tensor, per_row: int) -> Routing:
        return self._route_tokens(slots.unsqueeze(1).expand(-1, per_row).flatten())

    def _route_tokens(self, slots: Tensor) -> Routing:
        return slots, self.own(slots), self.rest(slots)

    def shrink_own(self, x: Tensor, routing: Routing, a: Tensor) -> Tensor:
        """h = where(own, x A^T, the rest)."""
        h: Tensor = self.select(self.shrink(x, a), *routing[1:])
        return h

    def linear(self, x: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        return self.expand(base(x), self.shrink_own(x, routing, a), b)

    def embedding(
        self, ids: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor
    ) -> Tensor:
        slots, own, rest = routing
        h = self.gather(ids, slots, a).repeat(1, self.num_slots)
        return self.expand(base(ids), self.select(h, own, rest), b)
