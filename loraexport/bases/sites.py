"""The modules that take a linear layer's or an embedding's place in a whole model.

A planned layer is one `ModelSite`, which flattens rows and tokens to [tokens, in] and calls the
strategies of layers. Where one input feeds several sites (q, k, v), they are slices of one layer:
its first caller computes all of them.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraexport_runtime.manifest import Layer

from ..errors import BaseModelError
from ..lora.rows import RowSlots
from ..lora.strategy import Base, Routing, Strategy


class RowContext:
    """What one forward of the model shares among its sites: the rows' slots, and the stacks."""

    def __init__(self, rows: RowSlots) -> None:
        self.rows = rows
        self.stacks: Mapping[str, Tensor] = {}
        self.selector: Tensor = torch.zeros(0)
        self._routings: dict[tuple[bool, int], Routing] = {}
        self._whole: dict[str, tuple[Tensor, Tensor]] = {}

    def begin(
        self, adapter_ids: Tensor, adapter_weights: Tensor | None, stacks: Mapping[str, Tensor]
    ) -> None:
        """Start a forward."""
        self.selector, self.stacks = self.rows(adapter_ids, adapter_weights), stacks
        self._routings, self._whole = {}, {}

    def routing(self, lora: Strategy, per_row: int, is_sequence: bool) -> Routing:
        """Rows of one token, or of `per_row`: a model has one sequence length."""
        key = (is_sequence, lora.rows_per_slot)
        if key not in self._routings:
            self._routings[key] = lora.route_rows(self.selector, per_row)
        return self._routings[key]

    def parameter(self, stack: str) -> Tensor:
        """Each row's own block of a stack of parameters, [batch, k, n]."""
        return self.rows.parameter(self.selector, self.stacks[stack])

    def once(self, site: "ModelSite", x: Tensor) -> Tensor:
        """The layer's whole output for x; computed for the first of its slices."""
        known = self._whole.get(site.name)
        if known is None or known[0] is not x:
            known = self._whole[site.name] = (x, site(x))
        return known[1]


class RowLinear(Base):
    """y = g W x + b for every token, with the output scale g and the bias b of its row.

    Where the layer has no stack of a role, g is 1 and b the base's own.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, layer: Layer, context: RowContext
    ) -> None:
        super().__init__(weight, bias)
        self._names = {stack.role: stack.name for stack in layer.stacks}
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]; weight [out, in]."""
        return self._with_parameters(self._product(x))

    def _product(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "only augmented layers keep W in their stack"
        return F.linear(x, self.weight)

    def _with_parameters(self, y: Tensor) -> Tensor:
        rows = y.view(self._context.selector.shape[0], -1, y.shape[-1])
        if "output_scale" in self._names:
            rows = rows * self._context.parameter(self._names["output_scale"])
        if "bias" in self._names:
            rows = rows + self._context.parameter(self._names["bias"])
        elif self.bias is not None:
            rows = rows + self.bias
        return rows.reshape(-1, y.shape[-1])


class RowEmbedding(RowLinear):
    """y = g E[ids], with the output scale g of the row."""

    def _product(self, x: Tensor) -> Tensor:
        assert self.weight is not None, "an embedding always has its weight"
        return F.embedding(x, self.weight)


class RowHead(RowLinear):
    """y = W x + b with the W and b of the row: a head of its own for every adapter."""

    def _product(self, x: Tensor) -> Tensor:
        weight = self._context.parameter(self._names["weight"])
        rows = x.view(weight.shape[0], -1, x.shape[-1])
        return torch.bmm(rows, weight.transpose(1, 2)).flatten(0, 1)


class ModelSite(nn.Module):
    """y = base(x) + scaling[s] B[s] (A[s] x) for every token, s the slot of its row."""

    def __init__(
        self, base: Base, lora: Strategy | None, layer: Layer, context: RowContext, factor: float
    ) -> None:
        """
        Args:
            lora: None where adapters bring whole weights only.
            factor: of the output; embeddings of some models scale theirs.
        """
        super().__init__()
        self.name = layer.name
        self.base = base
        self.lora = lora
        self.is_embedding = layer.kind == "embedding"
        self._names = {stack.role: stack.name for stack in layer.stacks}
        self._context = context
        self._factor = factor

    @property
    def weight(self) -> Tensor | None:
        """[out, in], for models that ask a layer's weight for its dtype (T5); None in a stack."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in] or [batch, n, in] -> the same with out for in; ids [batch, n] -> one more
        dimension, out."""
        self._require_rows(x)
        ids = self.is_embedding
        shape = x.shape if ids else x.shape[:-1]
        tokens = x.reshape(-1) if ids else x.reshape(-1, x.shape[-1])
        y = self._tokens(tokens, shape)
        y = y * self._factor if self._factor != 1 else y
        return y.view(*shape, y.shape[-1])

    def _tokens(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        if self.lora is None:
            y: Tensor = self.base(tokens)
            return y
        per_row = shape[1] if len(shape) == 2 else 1
        routing = self._context.routing(self.lora, per_row, len(shape) == 2)
        a, b = (self._context.stacks[self._names[role]] for role in ("lora_A", "lora_B"))
        compute = self.lora.embedding if self.is_embedding else self.lora.linear
        return compute(tokens, self.base, routing, a, b)

    def _require_rows(self, x: Tensor) -> None:
        dims = (1, 2) if self.is_embedding else (2, 3)
        if x.dim() not in dims or x.shape[0] != self._context.selector.shape[0]:
            raise BaseModelError(
                f"site {self.name!r} gets a tensor of shape {list(x.shape)}, where a batch of rows"
                " has to come first; its adapters cannot be told apart"
            )


class SlicedSite(nn.Module):
    """One slice of a layer that several sites share, in the place of one of them."""

    def __init__(self, whole: ModelSite, offset: int, width: int, context: RowContext) -> None:
        super().__init__()
        self.whole = whole
        self._columns = slice(offset, offset + width)
        self._context = context

    @property
    def weight(self) -> Tensor | None:
        """As ModelSite's, of the whole layer."""
        return self.whole.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in] or [batch, n, in] -> the same with the slice's width for in."""
        return self._context.once(self.whole, x)[..., self._columns]
