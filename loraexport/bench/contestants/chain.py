"""Equal layers one after another over one route: the project's strategies, in one graph."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from ...bases.layers import LayerModules
from ...export.example import example_inputs
from ...export.onnx import export_program, make_overridable
from ...export.outline import outline
from ...lora.layer import MultiLoraLinear
from ...lora.strategy import Expand, Shrink
from ...tensors import to_torch


class BaseChain(nn.Module):
    """x -> W x + b, layer after layer."""

    def __init__(self, layers: Sequence[LayerModules]) -> None:
        super().__init__()
        self.bases = nn.ModuleList(layer.segmented.base for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, in] -> [T, out]."""
        for base in self.bases:
            x = base(x)
        return x


class MixedChain(nn.Module):
    """The same with multi-LoRA by one of the strategies, the route made once."""

    def __init__(self, layers: Sequence[LayerModules]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer.stacked for layer in layers)

    def forward(
        self, x: Tensor, seg_indptr: Tensor, seg_slots: Tensor, stacks: list[Tensor]
    ) -> Tensor:
        """x [T, in], seg_indptr int64 [n + 1], seg_slots int64 [n]; stacks a, b of each layer."""
        first: Any = self.layers[0]
        routing = first.lora.route(seg_indptr, seg_slots, x.shape[0])
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, MultiLoraLinear), "layers of a workload are linear"
            x = first.lora.linear(x, layer.base, routing, *stacks[2 * index : 2 * index + 2])
        return x


class LoopChain(nn.Module):
    """The same by the seed's loop over segments, which are on the CPU."""

    def __init__(self, layers: Sequence[LayerModules]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer.segmented for layer in layers)

    def forward(self, x: Tensor, seg_indptr: Tensor, seg_slots: Tensor) -> Tensor:
        """As MixedChain's, without stacks."""
        for layer in self.layers:
            x = layer(x, seg_indptr, seg_slots)
        return x


class AloneChain(nn.Module):
    """y = (W x + b) + (x A^T) B with the A and B of one adapter for all of x: no mask."""

    def __init__(self, layers: Sequence[LayerModules]) -> None:
        super().__init__()
        self.bases = nn.ModuleList(layer.segmented.base for layer in layers)
        self.shrink = Shrink()
        self.expand = Expand()

    def forward(self, x: Tensor, stacks: list[Tensor]) -> Tensor:
        """x [T, in]; stacks a [rank, in], b [rank, out] of each layer."""
        for index, base in enumerate(self.bases):
            a, b = stacks[2 * index : 2 * index + 2]
            x = self.expand(base(x), self.shrink(x, a), b)
        return x


def export_chain(
    module: nn.Module,
    layers: Sequence[LayerModules],
    stacks: Mapping[str, np.ndarray],
    dtype: str,
    path: Path,
    outlined_slots: int | None = None,
) -> None:
    """Write one of the chains above as a graph x, [seg_indptr, seg_slots,] stacks -> y.

    Args:
        outlined_slots: of the stacks, where the LoRA part is to be a call of a function.
    """
    x, seg_indptr, seg_slots = example_inputs(layers[0].layer, dtype)
    tokens = torch.export.Dim("num_tokens", min=1)
    segments = torch.export.Dim("num_segments", min=1)
    arguments: tuple[Any, ...] = (x,)
    shapes: tuple[Any, ...] = ({0: tokens},)
    names = ["x"]
    if isinstance(module, MixedChain):
        arguments, names = (x, seg_indptr, seg_slots), ["x", "seg_indptr", "seg_slots"]
        shapes = (*shapes, {0: segments + 1}, {0: segments})
    if stacks:
        arguments = (*arguments, [to_torch(value) for value in stacks.values()])
        shapes, names = (*shapes, [None] * len(stacks)), [*names, *stacks]
    model = export_program(path.stem, module.eval(), arguments, shapes, 23, names, ["y"])
    if outlined_slots is not None:
        found = outline(model, [layer.layer for layer in layers], outlined_slots, stacks)
        assert len(found) == len(layers), "masked and augmented layers have functions"
    make_overridable(
        model.graph, {name: ir.Tensor(stack, name=name) for name, stack in stacks.items()}
    )
    ir.save(model, path, external_data=f"{path.name}.data")
