"""The inputs that tracing sees. No test or parity case uses these shapes or this pattern."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraexport_runtime.contract.kinds import TensorEntry, sequence_of
from loraexport_runtime.contract.manifest import Layer

from ..errors import BaseModelError
from ..hf.sentences.tail import PROMPT_LENGTHS
from ..tensors import TORCH_DTYPES, to_torch

if TYPE_CHECKING:  # transformers is for whole models only
    from ..bases.model import ModelModules

NUM_TOKENS = 11
SEGMENTS = ((1, 4), (0, 2), (1, 5))
"""(slot, number of tokens)."""


def example_inputs(layer: Layer, dtype: str) -> tuple[Tensor, Tensor, Tensor]:
    """(x or ids, seg_indptr, seg_slots) for tracing a layer."""
    if layer.kind == "embedding":
        x = torch.arange(NUM_TOKENS) % layer.in_features
    else:
        x = torch.linspace(-1, 1, NUM_TOKENS * layer.in_features).view(NUM_TOKENS, -1)
        x = x.to(TORCH_DTYPES[dtype])
    lengths = torch.tensor([0] + [length for _, length in SEGMENTS])
    return x, lengths.cumsum(0), torch.tensor([slot for slot, _ in SEGMENTS])


def model_label(name: str, modules: "ModelModules") -> str:
    """How errors speak of a whole model."""
    return f"{name!r} (a model of type {modules.model_type!r})"


def try_example_rows(name: str, modules: "ModelModules") -> tuple[dict[str, Tensor], Tensor]:
    """`example_rows`, with which the eager model has run once.

    Raises:
        BaseModelError: it fails before any exporter has a part in it.
    """
    inputs, adapter_ids = example_rows(modules.signature.inputs, modules.signature.outputs)
    stacks = [to_torch(value) for value in modules.stacks.values()]
    try:
        with torch.no_grad():
            weights = None
            if modules.blend_slots is not None:
                weights = example_weights(adapter_ids, modules.blend_slots)
            modules.module(inputs, adapter_ids, stacks, weights)
    except Exception as error:
        raise BaseModelError(
            f"{model_label(name, modules)} does not run with multi-LoRA sites: {error}"
        ) from error
    return inputs, adapter_ids


def example_weights(adapter_ids: Tensor, num_slots: int) -> Tensor:
    """adapter_weights float32 [batch, slots] for tracing: a quarter of slot 1 for each row."""
    weights = torch.zeros(adapter_ids.shape[0], num_slots)
    weights[:, 0] = 0.25
    return weights


def example_rows(
    inputs: Sequence[TensorEntry], outputs: Sequence[TensorEntry]
) -> tuple[dict[str, Tensor], Tensor]:
    """(a model's inputs by name, adapter_ids) for tracing: three rows, one padded on the right.

    Pixels, samples and spectrograms count up from -1 to 1.
    """
    length = sequence_of(outputs, 7)
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[1, sequence_of(outputs, 4) :] = 0
    places = torch.arange(3 * length).view(3, length)
    values = {
        "input_ids": 5 + places % 11,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(mask),
        "bbox": places.unsqueeze(-1) % 3 + torch.tensor([0, 1, 2, 3]),
        PROMPT_LENGTHS: torch.tensor([2, 1, 0]),
    }
    for entry in inputs:
        if entry.dtype != "int64":
            sizes = entry.sizes(3, length)
            numbers = torch.linspace(-1, 1, math.prod(sizes)).view(sizes)
            values[entry.name] = numbers.to(TORCH_DTYPES[entry.dtype])
    return {entry.name: values[entry.name] for entry in inputs}, torch.tensor([1, 0, 1])
