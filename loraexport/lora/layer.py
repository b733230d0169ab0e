"""The modules of a single layer's graph: base and LoRA of every slot, in place of the layer."""

from torch import Tensor, nn

from .strategy import LoraStrategy, SiteBase


class MultiLoraLinear(nn.Module):
    """y[t] = W x[t] + b + scaling[s] B[s] (A[s] x[t]), by one of the strategies over stacks."""

    def __init__(self, base: SiteBase, lora: LoraStrategy) -> None:
        super().__init__()
        self.base = base
        self.lora = lora

    def forward(
        self, x: Tensor, seg_indptr: Tensor, seg_slots: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        """x [T, in], seg_indptr int64 [n + 1], seg_slots int64 [n], stacks a, b -> [T, out]."""
        routing = self.lora.route(seg_indptr, seg_slots, x.shape[0])
        return self.lora.linear(x, self.base, routing, a, b)


class MultiLoraEmbedding(MultiLoraLinear):
    """y[t] = E[ids[t]] + scaling[s] B[s] A[s][:, ids[t]], by one of the strategies over stacks."""

    def forward(
        self, ids: Tensor, seg_indptr: Tensor, seg_slots: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        """ids int64 [T], seg_indptr int64 [n + 1], seg_slots int64 [n], stacks a, b -> [T, dim]."""
        routing = self.lora.route(seg_indptr, seg_slots, ids.shape[0])
        return self.lora.embedding(ids, self.base, routing, a, b)
