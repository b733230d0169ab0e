"""Segments -> the slot of each token."""

import torch
from torch import Tensor, nn


class TokenSegments(nn.Module):
    """segment[t] = number of segment ends at or before t.

    A one is scattered to every segment's end and summed up along the tokens, so the cost is
    num_tokens + num_segments, and empty segments need no care.
    """

    def forward(self, seg_indptr: Tensor, num_tokens: int) -> Tensor:
        """seg_indptr int64 [n + 1], num_tokens -> segment of each token, int64 [num_tokens]."""
        ends = seg_indptr[1:]
        marks = torch.zeros(num_tokens + 1, dtype=torch.int64, device=ends.device)
        counts = marks.scatter_add(0, ends, torch.ones_like(ends))
        return torch.cumsum(counts, 0)[:num_tokens]


class TokenSlots(nn.Module):
    """slots[t] = seg_slots[segment of t]."""

    def __init__(self) -> None:
        super().__init__()
        self.segments = TokenSegments()

    def forward(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Tensor:
        """seg_indptr int64 [n + 1], seg_slots int64 [n], num_tokens -> int64 [num_tokens]."""
        return seg_slots.index_select(0, self.segments(seg_indptr, num_tokens))
