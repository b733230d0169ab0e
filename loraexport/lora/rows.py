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
        whole = torch.cat([1 - selector.sum(1, keepdim=True), selector], dim=1)
        mixed = whole @ stack.view(1 + self.num_slots, -1)
        return mixed.view(selector.shape[0], -1, stack.shape[1])
