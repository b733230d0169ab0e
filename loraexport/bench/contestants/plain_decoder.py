"""A decoder's graph on plain onnxruntime: prompts and steps without an engine of any library."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...tensors import TORCH_DTYPES
from ..device import Device
from .bound_graph import NOT_CAPTURED, BoundGraph
from .decoders import PromptBatch

_LOGITS = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
}


class TorchDecoder:
    """The same graph on plain onnxruntime: shared KV buffers, the prefill never captured.

    A step reads an attention mask of full length, padded with zeros, so that its shapes and
    addresses stay and it can be captured; the likeliest token is chosen on the device.
    """

    most_steps = None
    prepare = None

    def __init__(
        self,
        graph: BoundGraph,
        config: Mapping[str, Any],
        prompts: PromptBatch,
        device: Device,
        dtype: str,
    ) -> None:
        """
        Args:
            config: `model` of genai_config.json.
        """
        integers: dict[str, Any] = {"device": device.torch, "dtype": torch.int64}
        rows, length = prompts.rows, prompts.length
        self._length, self._prompts = length + prompts.new_tokens, prompts
        floats: dict[str, Any] = {"device": device.torch, "dtype": TORCH_DTYPES[dtype]}
        decoder = config["decoder"]
        size = (rows, decoder["num_key_value_heads"], self._length, decoder["head_size"])
        past, present = {}, {}
        for layer in range(decoder["num_hidden_layers"]):
            for part in ("key", "value"):
                cache = torch.zeros(size, **floats)
                past[f"past_key_values.{layer}.{part}"] = cache
                present[f"present.{layer}.{part}"] = cache
        fixed = dict(past)
        if "adapter_ids" in graph.inputs:
            fixed["adapter_ids"] = torch.from_numpy(prompts.slots).to(device.torch)
        ids = torch.from_numpy(prompts.ids).to(device.torch)
        self._ids = torch.zeros(rows, 1, **integers)
        self._mask = torch.zeros(rows, self._length, **integers)
        self._positions = torch.zeros(rows, 1, **integers)
        logits = floats | {"dtype": _LOGITS[graph.outputs["logits"].type]}
        self._logits = torch.empty(rows, length, config["vocab_size"], **logits)
        self._next = torch.empty(rows, 1, config["vocab_size"], **logits)
        self._chosen = torch.zeros(rows, prompts.new_tokens, **integers)
        read = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        step = {"input_ids": self._ids, "attention_mask": self._mask}
        if "position_ids" in graph.inputs:
            read["position_ids"] = torch.arange(length, **integers).repeat(rows, 1)
            step["position_ids"] = self._positions
        outputs = {"logits": self._logits, **present}
        number = NOT_CAPTURED if graph.captured else None
        self._read = graph.bind({**read, **fixed}, outputs, number)
        self._step = graph.bind({**step, **fixed}, {**outputs, "logits": self._next})

    def prefill(self) -> None:
        self._read()

    def start_decode(self) -> None:
        self._read()
        self._mask.zero_()
        self._mask[:, : self._prompts.length] = 1
        self._choose(self._logits[:, -1:], 0)

    def decode(self, steps: int) -> None:
        for index in range(steps):
            at = self._prompts.length + index
            self._mask[:, at] = 1
            self._positions.fill_(at)
            self._step()
            self._choose(self._next, index + 1)

    def _choose(self, logits: Tensor, index: int) -> None:
        self._ids.copy_(logits.argmax(-1))
        self._chosen[:, index] = self._ids[:, 0]

    def logits(self) -> np.ndarray:
        return self._logits[:, -1].float().cpu().numpy()

    def tokens(self, num: int) -> np.ndarray:
        return self._chosen[:, :num].cpu().numpy()
