"""The modules that take a linear layer's or an embedding's place in a whole model.

A planned layer is one `ModelSite`, which flattens rows and tokens to [tokens, in] and calls the
strategies of layers. Where one input feeds several sites (q, k, v), they are slices of one layer:
its first caller computes all of them.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Layer

from ..errors import BaseModelError
from .augmented import Augmented
from .rows import RowSlots
from .strategy import LoraStrategy, Routing, SiteBase


class RowContext:
    """What one forward of the model shares among its sites: the rows' slots, and the stacks."""

    def __init__(self, rows: RowSlots) -> None:
        self.rows = rows
        self.stacks: Mapping[str, Tensor] = {}
        self.selector: Tensor = torch.zeros(0)
        self.shared: list[Tensor] | None = None
        """A list while sites get what is no row's own, [1, n, in]: their outputs, by row."""
        self._routings: dict[tuple[str, bool, bool, int, bool], Routing] = {}
        self._whole: dict[str, tuple[Tensor, list[Tensor]]] = {}

    def begin(
        self, adapter_ids: Tensor, adapter_weights: Tensor | None, stacks: Mapping[str, Tensor]
    ) -> None:
        """Start a forward."""
        self.selector, self.stacks = self.rows(adapter_ids, adapter_weights), stacks
        self._routings, self._whole = {}, {}

    def routing(self, lora: LoraStrategy, per_row: int, is_sequence: bool) -> Routing:
        """Rows of one token, or of `per_row`, which differs where patches stand beside tokens."""
        shared = self.shared is not None
        # By its text: under export and tracing a size is a symbol or a tensor, which have no hash.
        key = (str(per_row), is_sequence, shared, lora.rows_per_slot, lora.has_bias)
        if key not in self._routings:
            self._routings[key] = lora.route_rows(self.selector, per_row)
        return self._routings[key]

    def parameter(self, stack: str) -> Tensor:
        """Each row's own block of a stack of parameters, [batch, k, n]."""
        return self.rows.parameter(self.selector, self.stacks[stack])

    def once(self, site: "ModelSite", x: Tensor) -> list[Tensor]:
        """The outputs of all slices of a layer for x; computed for the first of them."""
        cached = self._whole.get(site.name)
        if cached is None or cached[0] is not x:
            cached = self._whole[site.name] = (x, site.slices(x))
        return cached[1]


class RowLinear(SiteBase):
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
        self,
        base: SiteBase,
        lora: LoraStrategy | None,
        layer: Layer,
        context: RowContext,
        factor: float,
        biases: Sequence[Tensor] = (),
    ) -> None:
        """
        Args:
            lora: None where adapters bring whole weights only.
            factor: of the output; embeddings of some models scale theirs.
            biases: of every product's output, where neither `base` nor a stack has them: the
                operators behind take them along (Gelu, the layer norm).
        """
        super().__init__()
        self.name = layer.name
        self.base = base
        self.lora = lora
        self.is_embedding = layer.kind == "embedding"
        self._a = next((stack.name for stack in layer.stacks if stack.role == "lora_A"), "")
        self._bs = [stack.name for stack in layer.stacks if stack.role == "lora_B"]
        self._widths = [part.width for part in layer.slices]
        self._context = context
        self._factor = factor
        self._biases = ["bias"] if len(biases) == 1 else [f"bias_{i}" for i in range(len(biases))]
        for name, bias in zip(self._biases, biases, strict=True):
            self.register_buffer(name, bias)

    @property
    def weight(self) -> Tensor | None:
        """[out, in], for models that ask a layer's weight for its dtype (T5); None in a stack."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in] or [batch, n, in] -> the same with out for in; ids [batch, n] -> one more
        dimension, out. Of a layer of one slice. For batch it may be k * batch: the k parts of a
        row one after the other, such as a picture's windows, or its tokens."""
        (y,) = self.slices(x)
        return y

    def slices(self, x: Tensor) -> list[Tensor]:
        """As `forward`, the output of every slice."""
        if self._context.shared is not None:
            x = x.expand(self._context.selector.shape[0], -1, -1)
        self._require_rows(x)
        ids = self.is_embedding
        shape = x.shape if ids else x.shape[:-1]
        tokens = x.reshape(-1) if ids else x.reshape(-1, x.shape[-1])
        ys = self._tokens(tokens, shape)
        ys = [y * self._factor for y in ys] if self._factor != 1 else ys
        wide = [y.view(*shape, y.shape[-1]) for y in ys]
        if self._biases:
            biases = [self.get_buffer(name) for name in self._biases]
            wide = [y + bias for y, bias in zip(wide, biases, strict=True)]
        is_joined = len(wide) < len(self._widths)
        outputs = list(torch.split(wide[0], self._widths, -1)) if is_joined else wide
        if self._context.shared is not None:
            self._context.shared += outputs
        return outputs

    def _tokens(self, tokens: Tensor, shape: torch.Size) -> list[Tensor]:
        """[T, out], or [T, width] of every slice."""
        if self.lora is None:
            return [self.base(tokens)]
        per_row = shape[1] if len(shape) == 2 else 1
        if shape[0] != self._context.selector.shape[0]:
            per_row = per_row * (shape[0] // self._context.selector.shape[0])
        routing = self._context.routing(self.lora, per_row, len(shape) == 2)
        stacks = self._context.stacks
        a, bs = stacks[self._a], [stacks[name] for name in self._bs]
        if len(bs) > 1:
            assert isinstance(self.lora, Augmented), "no other strategy has stacks side by side"
            return self.lora.slices(tokens, routing, a, bs)
        compute = self.lora.embedding if self.is_embedding else self.lora.linear
        return [compute(tokens, self.base, routing, a, bs[0])]

    def _require_rows(self, x: Tensor) -> None:
        dims = (1, 2) if self.is_embedding else (2, 3)
        if x.dim() not in dims or x.shape[0] % self._context.selector.shape[0] != 0:
            raise BaseModelError(
                f"site {self.name!r} gets a tensor of shape {list(x.shape)}, where a batch of rows"
                " has to come first; its adapters cannot be told apart"
            )


class SlicedSite(nn.Module):
    """One slice of a layer that several sites share, in the place of one of them."""

    def __init__(self, whole: ModelSite, index: int, context: RowContext) -> None:
        super().__init__()
        self.whole = whole
        self._index = index
        self._context = context

    @property
    def weight(self) -> Tensor | None:
        """As ModelSite's, of the whole layer."""
        return self.whole.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in] or [batch, n, in] -> the same with the slice's width for in."""
        return self._context.once(self.whole, x)[self._index]
