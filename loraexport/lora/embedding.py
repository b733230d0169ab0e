"""The module that replaces an embedding: base and LoRA of every slot."""

from torch import Tensor, nn

from .strategy import Base, Strategy


class MultiLoraEmbedding(nn.Module):
    """y[t] = E[ids[t]] + scaling[s] B[s] A[s][:, ids[t]], by one of the strategies over stacks."""

    def __init__(self, base: Base, lora: Strategy) -> None:
        super().__init__()
        self.base = base
        self.lora = lora

    def forward(
        self, ids: Tensor, seg_indptr: Tensor, seg_slots: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        """ids int64 [T], seg_indptr int64 [n + 1], seg_slots int64 [n], stacks a, b -> [T, dim]."""
        routing = self.lora.route(seg_indptr, seg_slots, ids.shape[0])
        return self.lora.embedding(ids, self.base, routing, a, b)
