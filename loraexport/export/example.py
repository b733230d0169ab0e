"""The inputs that tracing sees. No test or parity case uses these shapes or this pattern."""

import torch
from torch import Tensor

from loraexport_runtime.manifest import Layer

from ..tensors import TORCH_DTYPES

NUM_TOKENS = 11
SEGMENTS = ((1, 4), (0, 2), (1, 5))
"""(slot, number of tokens)."""


def example_inputs(layer: Layer, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x or ids, seg_indptr, seg_slots) for tracing a layer."""
    if layer.kind == "embedding":
        x = torch.arange(NUM_TOKENS) % layer.in_features
    else:
        x = torch.linspace(-1, 1, NUM_TOKENS * layer.in_features).view(NUM_TOKENS, -1)
        x = x.to(TORCH_DTYPES[dtype])
    lengths = torch.tensor([0] + [length for _, length in SEGMENTS])
    return x, lengths.cumsum(0), torch.tensor([slot for slot, _ in SEGMENTS])
