"""What a row of a whole model uses: one slot, or a blend of several.

A row's parameter is that of its slot, slot 0 being the base; with a blend it is
p = p_0 + sum_i w_i (p_i - p_0), for which every site gives base + sum_i w_i (y_i - base).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowSlots(nn.Module):
    """One slot per row. A stack of parameters has the base's block first."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots

    def forward(self, adapter_ids: Tensor, adapter_weights: Tensor | None) -> Tensor:
        """adapter_ids int64 [batch] -> the selector of the batch, here the same."""
        return adapter_ids

    def parameter(self, selector: Tensor, stack: Tensor) -> Tensor:
        """stack [(1 + S) * k, n] -> each row's own block [batch, k, n]."""
        return stack.view(1 + self.num_slots, -1, stack.shape[1]).index_select(0, selector)

    def product(self, selector: Tensor, x: Tensor, stack: Tensor) -> Tensor:
        """y = x W^T with the W of the row: x [batch, n, in], stack [(1 + S) * out, in] ->
        [batch, n, out]. One product with all of them reads each W once; `parameter` would copy one
        for every row, for which an output layer of a whole vocabulary is too large."""
        every = F.linear(x, stack)
        return self.choose(selector, every.view(*x.shape[:2], 1 + self.num_slots, -1))

    def look_up(self, selector: Tensor, ids: Tensor, stack: Tensor) -> Tensor:
        """y = E[ids] with the E of the row: ids [batch, n], stack [(1 + S) * vocabulary, dim] ->
        [batch, n, dim]."""
        size = stack.shape[0] // (1 + self.num_slots)
        return F.embedding(selector.unsqueeze(1) * size + ids, stack)

    def choose(self, selector: Tensor, every: Tensor) -> Tensor:
        """Of what all slots give, [batch, n, 1 + S, out], each row's own, [batch, n, out]."""
        batch, n, size, _ = every.shape
        slots = selector.unsqueeze(1).expand(-1, n).flatten()
        at = torch.arange(batch * n, device=slots.device) * size + slots
        return every.flatten(0, 2).index_select(0, at).view(batch, n, -1)


class RowBlend(RowSlots):
    """Weights of slots per row: selector float [batch, S]; a weight of 0 selects nothing."""

    def __init__(self, num_slots: int, dtype: torch.dtype) -> None:
        super().__init__(num_slots)
        self.dtype = dtype

    def forward(self, adapter_ids: Tensor, adapter_weights: Tensor | None) -> Tensor:
        """adapter_ids int64 [batch], adapter_weights float32 [batch, S] -> their sum [batch, S]."""
        assert adapter_weights is not None, "a graph with a blend has this input"
        chosen = F.one_hot(adapter_ids, 1 + self.num_slots)[:, 1:]
        return (chosen + adapter_weights).to(self.dtype)

    def parameter(self, selector: Tensor, stack: Tensor) -> Tensor:
        whole = self._with_base(selector)
        mixed = whole @ stack.view(1 + self.num_slots, -1)
        return mixed.view(selector.shape[0], -1, stack.shape[1])

    def look_up(self, selector: Tensor, ids: Tensor, stack: Tensor) -> Tensor:
        size = stack.shape[0] // (1 + self.num_slots)
        first = torch.arange(1 + self.num_slots, device=ids.device) * size
        return self.choose(selector, F.embedding(first + ids.unsqueeze(2), stack))

    def choose(self, selector: Tensor, every: Tensor) -> Tensor:
        whole = self._with_base(selector).unsqueeze(1).unsqueeze(2)
        return (whole @ every).squeeze(2)

    def _with_base(self, selector: Tensor) -> Tensor:
        """The weights of slots with the base's ahead, [batch, 1 + S]; together 1."""
        return torch.cat([1 - selector.sum(1, keepdim=True), selector], dim=1)
