"""DeBERTa's attention, whose relative positions pass the projections too: by row, with adapters.

With `share_att_key` query and key project the positions' embeddings [1, n, hidden] as they do the
texts; without it layers of their own do. An adapter moves both, so every row has positions.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention

from .model_sites import RowContext


def give_rows_positions(model: nn.Module, context: RowContext) -> None:
    """Change the attentions of a model whose sites are replaced; other models stay as they are."""
    for module in model.modules():
        if isinstance(module, DisentangledSelfAttention):
            _by_row(module, context)


class _RowScores:
    """Positions that each row has already, where the attention repeats the only ones for each."""

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores

    def repeat(self, *_: int) -> Tensor:
        return self._scores


def _by_row(attention: Any, context: RowContext) -> None:
    bias, transpose = attention.disentangled_attention_bias, attention.transpose_for_scores

    def bias_by_row(*arguments: Any) -> Tensor:
        context.shared = []
        try:
            scores: Tensor = bias(*arguments)
        finally:
            context.shared = None
        return scores

    def transpose_by_row(x: Tensor, heads: int) -> Any:
        scores = transpose(x, heads)
        of_rows = context.shared is not None and any(x is y for y in context.shared)
        return _RowScores(scores) if of_rows else scores

    attention.disentangled_attention_bias = bias_by_row
    attention.transpose_for_scores = transpose_by_row
