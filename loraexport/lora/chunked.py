"""`chunked`: tokens in fixed chunks of one slot each; A and B gathered per chunk, batched products.

y = (x W^T + b) + where(slot > 0, (X_c A_c^T) B_c, 0), c the chunk of a token. Wins with many slots
and many tokens: no token meets another slot's A or B. The number of chunks depends on the shapes
alone (T // chunk + n is enough for n segments), so no value travels to the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .segments import TokenSegments
from .strategy import Gather, LoraStrategy, Routing, SiteBase, StackSizes

CHUNK = 64


class ChunkLayout(nn.Module):
    """Where each token sits in the chunks, and which token each place of a chunk holds."""

    def __init__(self, chunk: int) -> None:
        super().__init__()
        self.chunk = chunk
        self.segments = TokenSegments()

    def forward(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Routing:
        """seg_indptr int64 [n + 1], seg_slots int64 [n] -> slots [T], places [T],
        tokens [chunks, chunk] (places that no token takes hold token 0), chunk_slots [chunks].
        """
        segment = self.segments(seg_indptr, num_tokens)
        slots = seg_slots.index_select(0, segment)
        starts = seg_indptr[:-1]
        lengths = seg_indptr[1:] - starts
        # Exact below 2^24 tokens, as chunk is a power of two; an integer division exports to more.
        chunks = torch.ceil(lengths / self.chunk).to(torch.int64)
        first_chunk = torch.cumsum(chunks, 0) - chunks
        tokens = torch.arange(num_tokens, device=segment.device)
        # A segment starts on a chunk boundary and fills its chunks in order.
        places = tokens + (first_chunk * self.chunk - starts).index_select(0, segment)
        num_chunks = num_tokens // self.chunk + seg_slots.shape[0]
        empty = torch.zeros(num_chunks * self.chunk, dtype=torch.int64, device=tokens.device)
        chunk_tokens = empty.scatter(0, places, tokens).view(num_chunks, self.chunk)
        return slots, places, chunk_tokens, slots.index_select(0, chunk_tokens[:, 0])


class SlotFactors(nn.Module):
    """The factor of each chunk's slot, out of a stack."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots

    def forward(self, stack: Tensor, chunk_slots: Tensor) -> Tensor:
        """stack [S * W, n], chunk_slots int64 [chunks] -> [chunks, W, n]; slot 0 gets slot 1's."""
        per_slot = stack.view(self.num_slots, -1, stack.shape[1])
        return per_slot.index_select(0, (chunk_slots - 1).clamp(min=0))


class ChunkShrink(nn.Module):
    """h = X_c A_c^T per chunk c."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.factors = SlotFactors(num_slots)

    def forward(self, x: Tensor, a: Tensor, chunk_slots: Tensor) -> Tensor:
        """x [chunks, chunk, in], a [S * W, in] -> [chunks, chunk, W]."""
        return torch.bmm(x, self.factors(a, chunk_slots).transpose(1, 2))


class ChunkExpand(nn.Module):
    """y + where(slot > 0, H_c B_c, 0), back in the order of the tokens."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.factors = SlotFactors(num_slots)

    def forward(
        self, y: Tensor, h: Tensor, b: Tensor, slots: Tensor, places: Tensor, chunk_slots: Tensor
    ) -> Tensor:
        """y [T, out], h [chunks, chunk, W], b [S * W, out], routing as in ChunkLayout."""
        delta = torch.bmm(h, self.factors(b, chunk_slots)).flatten(0, 1)
        token_delta = delta.index_select(0, places)
        zero = torch.zeros((), dtype=y.dtype, device=y.device)
        return y + torch.where((slots > 0).unsqueeze(1), token_delta, zero)


class Chunked(LoraStrategy):
    """See the module's formula. Routing: what ChunkLayout gives."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__(sizes)
        self.layout = ChunkLayout(CHUNK)
        self.gather = Gather(sizes.in_features)
        self.shrink = ChunkShrink(sizes.num_slots)
        self.expand = ChunkExpand(sizes.num_slots)

    def route(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Routing:
        return self.layout(seg_indptr, seg_slots, num_tokens)

    def linear(self, x: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        slots, places, chunk_tokens, chunk_slots = routing
        h = self.shrink(F.embedding(chunk_tokens, x), a, chunk_slots)
        return self.expand(base(x), h, b, slots, places, chunk_slots)

    def embedding(
        self, ids: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor
    ) -> Tensor:
        slots, places, chunk_tokens, chunk_slots = routing
        h = F.embedding(chunk_tokens, self.gather(ids, slots, a))
        return self.expand(base(ids), h, b, slots, places, chunk_slots)
