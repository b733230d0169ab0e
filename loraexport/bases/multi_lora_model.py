"""The whole model as one torch module, with adapter_ids beside its own inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.inputs.signature import Signature
from ..hf.model import take_output
from ..hf.sentences.tail import PROMPT_LENGTHS
from ..lora.model_sites import RowContext
from .masks import attention_masks


class MultiLoraModel(nn.Module):
    """A Hugging Face model with multi-LoRA sites: the model's inputs, adapter_ids and stacks in."""

    def __init__(
        self,
        model: nn.Module,
        task: str,
        signature: Signature,
        tail: nn.Module | None,
        context: RowContext,
        stack_names: Sequence[str],
        position_ids: bool,
    ) -> None:
        super().__init__()
        self.model = model
        self._task = task
        self.pooling = tail  # nodes of graphs are named after it
        self.rows = context.rows
        self._context = context
        names = [entry.name for entry in signature.inputs]
        self._input_names = [name for name in names if name != PROMPT_LENGTHS]
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
        arguments: dict[str, Any] = {name: inputs[name] for name in self._input_names}
        if self._position_ids and "input_ids" in inputs:
            # Rotary models export right beyond one row only if each row brings its positions.
            ids = inputs["input_ids"]
            positions = torch.arange(ids.shape[1], device=ids.device)
            arguments["position_ids"] = positions.unsqueeze(0).expand(ids.shape[0], -1)
        if "attention_mask" in arguments:
            mask = attention_masks(self.model.config, arguments["attention_mask"])
            arguments["attention_mask"] = mask
        return self.finish(self.run(arguments), inputs)

    def begin(
        self, selector: Tensor, stacks: Sequence[Tensor], adapter_weights: Tensor | None
    ) -> None:
        """Start a forward whose rows use these slots."""
        stacks_by_name = dict(zip(self._stack_names, stacks, strict=True))
        self._context.begin(selector, adapter_weights, stacks_by_name)

    def run(self, inputs: Mapping[str, Any], **options: Any) -> Tensor:
        """The model's output, before what stands behind it."""
        y: Tensor = take_output(self.model(**inputs, **options, return_dict=True), self._task)
        return y

    def finish(self, y: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """y, or what the tail makes of it: one vector for each row, or scores."""
        if self.pooling is None:
            return y
        pooled: Tensor = self.pooling(y, inputs.get("attention_mask"), inputs.get(PROMPT_LENGTHS))
        return pooled
