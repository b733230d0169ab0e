"""Whole models in eager torch: the seed's loop in place of the strategies, and PEFT."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraexport_runtime.contract.manifest import Layer

from ...hf.quiet import quiet_models
from ...lora.model_sites import ModelSite
from ...lora.segmented import add_segmented_lora
from ...lora.strategy import LoraStrategy, Routing, SiteBase, StackSizes
from ..work import CannotRun


class LoopOverStacks(LoraStrategy):
    """The seed's loop over the stacks of a site: a segment for each row.

    Routing: (seg_indptr, seg_slots), on the CPU. B holds the scaling, so that every alpha is 1.
    """

    def __init__(self, num_slots: int, layer: Layer, dtype: torch.dtype) -> None:
        super().__init__(StackSizes.of(layer, num_slots, dtype))
        self._rank = layer.max_rank
        self._columns = [part.offset for part in layer.slices] + [layer.out_features]

    def route(self, seg_indptr: Tensor, seg_slots: Tensor, num_tokens: int) -> Routing:
        return seg_indptr, seg_slots

    def linear(self, x: Tensor, base: SiteBase, routing: Routing, a: Tensor, b: Tensor) -> Tensor:
        columns, width, slots = self._columns, self.rows_per_slot, range(self.num_slots)
        slices = range(len(columns) - 1)
        return add_segmented_lora(
            base(x),
            x,
            routing[0],
            routing[1],
            a,
            [b[:, columns[k] : columns[k + 1]] for k in slices],
            [slot * width for slot in range(self.num_slots + 1)],
            [slot * width + k * self._rank for slot in slots for k in slices],
            [self._rank] * (self.num_slots * len(slices)),
            columns,
            [1.0] * self.num_slots,
            False,
        )


def with_loop(model: nn.Module, layers: Sequence[Layer], num_slots: int) -> Any:
    """Let the sites of a multi-LoRA model run the seed's loop; adapter_ids on the CPU then."""
    by_name = {layer.name: layer for layer in layers}
    for site in model.modules():
        if isinstance(site, ModelSite):
            if site.is_embedding:
                raise CannotRun("its sites have an embedding, for which there is no such loop here")
            assert site.weight is not None, "the eager model is masked"
            site.lora = LoopOverStacks(num_slots, by_name[site.name], site.weight.dtype)
    return model


def wrap_with_peft(model: nn.Module, folder: Path, names: Sequence[str]) -> Any:
    """A model with every adapter of `folder` by name, for PEFT's mixed batch (`adapter_names`)."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CannotRun("peft is not installed; install 'loraexport[bench]'") from error
    first, *remaining = names
    plain: Any = model
    with quiet_models():
        wrapped = PeftModel.from_pretrained(plain, str(folder / first), adapter_name=first)
        for name in remaining:
            wrapped.load_adapter(str(folder / name), adapter_name=name)
    parameter = next(plain.parameters())
    return wrapped.to(device=parameter.device, dtype=parameter.dtype).eval()
