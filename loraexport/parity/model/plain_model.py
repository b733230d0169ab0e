"""The Hugging Face model in float64, with one row's adapters merged into its weights."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from loraexport_runtime.adapters.packing import lowest
from loraexport_runtime.checking.model import Inputs, Mix, Outputs
from loraexport_runtime.contract.kinds import Model
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ...hf.model import has_rotary_positions, headless_widths, load_plain_model, take_output
from ...hf.sentences.pooling import make_tail
from ...hf.sentences.tail import PROMPT_LENGTHS, Tail
from ...tensors import to_numpy, to_torch
from ..oracle import ReferenceAdapter
from .cases import Contents


class PlainModel:
    """The Hugging Face model without sites, into which adapters can be merged.

    Labels that a head lacks are given as the graphs give them (see stacks.lowest).
    """

    source = "the float64 model, merged"

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        model: Model,
        adapters: Mapping[int, ReferenceAdapter],
        dtype: torch.dtype = torch.float64,
        tail: Tail | None = None,
    ) -> None:
        headless = headless_widths(manifest.layers)
        self.model: Any = load_plain_model(directory, model.task, headless).to(dtype)
        self._tail = None if tail is None else make_tail(tail).to(dtype)
        config: Any = self.model.config
        self.label = f"a model of type {config.model_type!r}"
        # A model of images has none of them.
        self.contents = Contents(
            getattr(config, "vocab_size", 0),
            getattr(config, "pad_token_id", 0) or 0,
            _end(config) if model.task == "text-embedding" else None,
            getattr(config, "max_2d_position_embeddings", 1) - 1,
        )
        self._adapters = adapters
        self._output, self._task = model.outputs[0].name, model.task
        self._dtype = dtype
        self._labels = any(layer.labels for layer in manifest.layers)
        self._width = model.outputs[0].shape[-1]
        self._missing_label = lowest(NUMPY_DTYPES[manifest.dtype])

    def __call__(self, inputs: Inputs, **arguments: Any) -> np.ndarray:
        """The output for a batch, in the model's dtype; `arguments` go to the model as they are."""
        tensors = {name: to_torch(value) for name, value in inputs.items()}
        tensors = {
            name: x.to(self._dtype) if x.is_floating_point() else x for name, x in tensors.items()
        }
        if "input_ids" in tensors and has_rotary_positions(self.model.config):
            batch, sequence = tensors["input_ids"].shape
            tensors["position_ids"] = torch.arange(sequence).expand(batch, -1)
        prompt_lengths = tensors.pop(PROMPT_LENGTHS, None)
        with torch.no_grad():
            y = take_output(self.model(**tensors, **arguments, return_dict=True), self._task)
            if self._labels:
                lacking = (0, int(self._width) - y.shape[-1])
                y = nn.functional.pad(y, lacking, value=self._missing_label)
            if self._tail is not None:
                y = self._tail(y, tensors.get("attention_mask"), prompt_lengths)
        return to_numpy(y)

    def of(self, model: Any) -> "PlainModel":
        """The same around another model of its class."""
        other = copy.copy(self)
        other.model = model
        return other

    def run(self, inputs: Inputs, mix: Mix) -> Outputs:
        """See ReferenceModel."""
        with merged_into(self.model, self._adapters, mix):
            return {self._output: self(inputs)}


def _end(config: Any) -> int | None:
    """The id of a text's last token; None where config.json names one that there is not."""
    end = config.eos_token_id
    return end if isinstance(end, int) and end < config.vocab_size else None


@contextmanager
def merged_into(model: Any, adapters: Mapping[int, ReferenceAdapter], mix: Mix) -> Iterator[None]:
    """W + sum_i w_i (W_i - W) and its bias in every site of a float64 model, undone at the end."""
    parameters = {}
    for site in {
        site for slot, _ in mix for site in (*adapters[slot].sites, *adapters[slot].heads)
    }:
        module = model.get_submodule(site)
        parameters[site] = (module.weight, getattr(module, "bias", None))
        weight, bias = _blend(module, site, adapters, mix)
        # Parameters of its own: an embedding may be tied to this one, and stays as it is.
        module.weight = nn.Parameter(torch.from_numpy(weight), requires_grad=False)
        if bias is not None:
            module.bias = nn.Parameter(torch.from_numpy(bias), requires_grad=False)
    try:
        yield
    finally:
        for site, (own_weight, own_bias) in parameters.items():
            module = model.get_submodule(site)
            module.weight = own_weight
            if own_bias is not None or hasattr(module, "bias"):
                module.bias = own_bias


def _blend(
    module: Any, site: str, adapters: Mapping[int, ReferenceAdapter], mix: Mix
) -> tuple[np.ndarray, np.ndarray | None]:
    """The merged (weight, bias) as the module stores them."""
    # An embedding and a Conv1D store [in, out].
    turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    weight = module.weight.detach().numpy()
    weight = weight.T if turned else weight
    bias = getattr(module, "bias", None)
    own_bias = None if bias is None else bias.detach().numpy()
    parts = []
    for slot, factor in mix:
        of_slot = adapters[slot].merge(site, weight, own_bias)
        if turned and site in adapters[slot].heads:
            of_slot = of_slot[0].T, of_slot[1]
        parts.append((of_slot, factor))
    if len(parts) == 1 and parts[0][1] == 1.0:  # exactly; a head may be of another width
        merged, merged_bias = parts[0][0]
    else:
        merged = weight + sum(factor * (site_weight - weight) for (site_weight, _), factor in parts)
        zero = np.zeros(len(weight))
        start = zero if own_bias is None else own_bias
        merged_bias = start + sum(
            factor * ((zero if site_bias is None else site_bias) - start)
            for (_, site_bias), factor in parts
        )
    merged = merged.T if turned else merged
    return np.ascontiguousarray(merged), None if turned and own_bias is None else merged_bias
