"""The whole model as one torch module, with adapter_ids beside its own inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.model import take_output
from ..hf.skeleton import Signature
from ..lora.model_sites import RowContext


class MultiLoraModel(nn.Module):
    """A Hugging Face model with multi-LoRA sites: the model's inputs, adapter_ids and stacks in."""

    def __init__(
        self,
        model: nn.Module,
        signature: Signature,
        pooling: nn.Module | None,
        context: RowContext,
        stack_names: Sequence[str],
        position_ids: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.rows = context.rows
        self._context = context
        self._input_names = [entry.name for entry in signature.inputs]
        self._stack_names = list(stack_names)
        self._position_ids = position_ids

    def forward(
        self,
        inputs: dict[str, Tensor],
        adapter_ids: Tensor,
        stacks: list[Tensor],
        adapter_weights: Tensor | None = None,
    ) -> Tensor:
        """adapter_ids int64 [batch]; stacks in the order of the manifest's layers; with a blend
        adapter_weights float32 [batch, S]."""
        self.begin(adapter_ids, stacks, adapter_weights)
        arguments = {name: inputs[name] for name in self._input_names}
        if self._position_ids and "input_ids" in inputs:
            # Rotary models export right beyond one row only if each row brings its positions.
            ids = inputs["input_ids"]
            positions = torch.arange(ids.shape[1], device=ids.device)
            arguments["position_ids"] = positions.unsqueeze(0).expand(ids.shape[0], -1)
        return self.pooled(self.run(arguments), inputs.get("attention_mask"))

    def begin(
        self, selector: Tensor, stacks: Sequence[Tensor], adapter_weights: Tensor | None
    ) -> None:
        """Start a forward whose rows use these slots."""
        named = dict(zip(self._stack_names, stacks, strict=True))
        self._context.begin(selector, adapter_weights, named)

    def run(self, inputs: Mapping[str, Tensor], **others: Any) -> Tensor:
        """The model's output, before pooling."""
        y: Tensor = take_output(self.model(**inputs, **others, return_dict=True))
        return y

    def pooled(self, y: Tensor, attention_mask: Tensor | None) -> Tensor:
        """y, or with a pooling one vector for each row."""
        return y if self.pooling is None else self.pooling(y, attention_mask)
