"""What multi-LoRA computes at a site of a graph that exists: modules to export as its functions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Layer

from ..graphs.products import Layout
from ..lora.augmented import Augmented
from ..lora.blended import Blended
from ..lora.masked import Masked
from ..lora.rows import RowBlend, RowSlots
from ..lora.strategy import SiteBase, StackSizes


class _Given(SiteBase):
    """The base's output, which the graph has computed."""

    def __init__(self, y: Tensor) -> None:
        super().__init__(None, None)
        self._y = y

    def forward(self, x: Tensor) -> Tensor:
        """y, whatever x is."""
        return self._y


class Selector(nn.Module):
    """What each row blends of the slots."""

    def __init__(self, rows: RowBlend) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, adapter_ids: Tensor, adapter_weights: Tensor) -> Tensor:
        """adapter_ids int64 [batch], adapter_weights float32 [batch, S] -> [batch, S]."""
        selector: Tensor = self.rows(adapter_ids, adapter_weights)
        return selector


class Site(nn.Module):
    """y' = g y + b + where(own, x A^T, 0) B for one layer, y in one part or one per slice; of rows
    that blend slots, h is weighed and g and b are mixed (see blended.py, rows.py).

    Where the layer has no stack of a role, g is 1 and b is not added here; with one of whole
    weights y is made of these.
    """

    def __init__(self, layer: Layer, sizes: StackSizes | None, rows: RowSlots) -> None:
        """`sizes`: of A and B; None: there are none."""
        super().__init__()
        self.rows = rows
        self.lora: Masked | None = None
        if sizes is not None:
            self.lora = Blended(sizes) if isinstance(rows, RowBlend) else Masked(sizes)
        self._roles: list[str] = [stack.role for stack in layer.stacks]
        self._is_embedding = layer.kind == "embedding"

    def forward(
        self, x: Tensor, routes: list[Tensor], stacks: list[Tensor], ys: list[Tensor]
    ) -> Any:
        """x [batch, n, in], or ids [batch, n]; routes: own bool, or weights, [batch, 1, S * W], and
        what selects the rows' slots, where each is needed; ys [batch, n, out], none where the
        layer has whole weights -> the same as ys.

        Or x [rows, in], own [rows, S * W], ys [rows, out].
        """
        values = dict(zip(self._roles, stacks, strict=True))
        if "weight" in values:
            make = self.rows.look_up if self._is_embedding else self.rows.product
            ys = [make(routes[-1], x, values["weight"])]
        ys = self._with_parameters(routes[-1], values, ys)
        if self.lora is None:
            return tuple(ys)
        a, b = values["lora_A"], values["lora_B"]
        if self._is_embedding:
            tokens, y = x.flatten(), ys[0].flatten(0, 1)
            routing = self.lora.route_rows(routes[-1], x.shape[1])
            return (self.lora.embedding(tokens, _Given(y), routing, a, b).view(*x.shape, -1),)
        own = routes[0]
        routing = (own,) if isinstance(self.lora, Blended) else (own, own, self.lora.rest(own))
        if len(ys) == 1:
            return (self.lora.linear(x, _Given(ys[0]), routing, a, b),)
        # Added part by part: joined, all of y would be written twice more.
        added = self.lora.shrink_own(x, routing, a) @ b
        parts = torch.split(added, [y.shape[-1] for y in ys], dim=-1)
        return tuple(y + part for y, part in zip(ys, parts, strict=True))

    def _with_parameters(
        self, selector: Tensor, values: Mapping[str, Tensor], ys: list[Tensor]
    ) -> list[Tensor]:
        """g y + b, of each row's own."""
        widths = [y.shape[-1] for y in ys]
        for role in ("output_scale", "bias"):
            if role in values:
                own = torch.split(self.rows.parameter(selector, values[role]), widths, dim=-1)
                pairs = zip(ys, own, strict=True)
                ys = [y * part if role == "output_scale" else y + part for y, part in pairs]
        return ys


class AugmentedSite(nn.Module):
    """y' = [x | where(own, x A^T, 0)] [W^T ; B] of every product of one layer."""

    def __init__(self, sizes: StackSizes) -> None:
        super().__init__()
        self.lora = Augmented(sizes)

    def forward(self, x: Tensor, routes: list[Tensor], stacks: list[Tensor]) -> Any:
        """x [batch, n, in], routes: own bool [batch, 1, S * W], stacks: A, and of every product
        [in + S * W, out] -> [batch, n, out]."""
        (own,), (a, *bs) = routes, stacks
        return tuple(self.lora.slices(x, (own, own, self.lora.rest(own)), a, bs))


class Route(nn.Module):
    """Which columns of the stacks are each row's own, or what it weighs them by."""

    def __init__(self, sizes: StackSizes, layout: Layout, blend: bool) -> None:
        super().__init__()
        self.lora = Blended(sizes) if blend else Masked(sizes)
        self._layout = layout

    def forward(self, selector: Tensor, x: Tensor | None = None) -> Tensor:
        """selector: adapter_ids int64 [batch], or weights [batch, S] -> own bool [batch, S * W] or
        weights likewise, or [batch, 1, S * W], which serves every token; for flat x
        [batch * n, in] [batch * n, S * W]."""
        per_row = 1 if x is None else x.shape[0] // selector.shape[0]
        routing = self.lora.route_rows(selector, per_row)
        own = routing[0] if isinstance(self.lora, Blended) else routing[1]
        return own.unsqueeze(1) if self._layout == "batched" else own
