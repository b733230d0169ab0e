"""Whole models of texts without their padding: every token of a batch is a row of its own.

A model's layers see [T, 1, …], T the batch's real tokens, so that its sites take each token's own
slot as they take a row's; attention alone knows which tokens are of one text. T depends on the
mask's values, so no CUDA graph can hold such a graph.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from loraexport_runtime.contract.kinds import Packed

from ..errors import BaseModelError
from ..hf.sentences.tail import PROMPT_LENGTHS
from .multi_lora_model import MultiLoraModel

_NAME = "loraexport_packed"
_NOT_OF_TOKENS = ("attention_mask", PROMPT_LENGTHS)
_OPERATOR = "com.microsoft::PackedMultiHeadAttention"


def _columns(input_ids: Tensor, padding: int | None) -> Tensor:
    """Positions that count a text's columns, [batch, sequence]."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def _behind_padding(input_ids: Tensor, padding: int | None) -> Tensor:
    """Positions that count the ids that are not padding, behind the padding's own id."""
    assert padding is not None, "such a model has a padding id"
    shown = (input_ids != padding).to(torch.int64)
    return shown.cumsum(1) * shown + padding


_POSITIONS: dict[str, Callable[[Tensor, int | None], Tensor]] = {
    "bert": _columns,
    "roberta": _behind_padding,
    "xlm-roberta": _behind_padding,
}
"""How models of a type number their tokens."""


@dataclass(frozen=True)
class Packing:
    """Which tokens of a batch are real, and where their texts begin."""

    tokens: Tensor
    """int64 [T]: their places among batch * sequence, text after text."""
    rows: Tensor
    """int64 [T]: the row of each."""
    shown: Tensor
    """bool [batch, sequence]: column j of a text moved to the left has a token."""
    offset: Tensor
    """int32 [batch, sequence]: the places where `shown` is true, then the others."""
    cumulated: Tensor
    """int32 [batch + 1]: row i has the tokens from cumulated[i] to cumulated[i + 1]."""

    @classmethod
    def of(cls, attention_mask: Tensor) -> "Packing":
        """attention_mask int64 [batch, sequence], 1 for a real token, wherever they are."""
        real = (attention_mask != 0).flatten()
        tokens, lengths = real.nonzero().squeeze(1), (attention_mask != 0).sum(1)
        columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        shown = columns < lengths.unsqueeze(1)
        places = [mask.flatten().nonzero().squeeze(1) for mask in (shown, ~shown)]
        return cls(
            tokens,
            tokens // attention_mask.shape[1],
            shown,
            torch.cat(places).view(attention_mask.shape).to(torch.int32),
            F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        )

    def pick(self, x: Tensor) -> Tensor:
        """[batch, sequence] -> each real token's own, [T, 1]."""
        return x.reshape(-1).index_select(0, self.tokens).unsqueeze(1)

    def restore(self, y: Tensor) -> Tensor:
        """[T, 1, n] -> [batch, sequence, n], zeros where the mask is 0."""
        wide = y.new_zeros(self.offset.numel(), y.shape[-1])
        return wide.index_copy(0, self.tokens, y.squeeze(1)).view(*self.offset.shape, -1)


class PackedModel(MultiLoraModel):
    """A MultiLoraModel that computes the real tokens of a batch alone."""

    def pack(self, runs_on: Packed) -> "PackedModel":
        """
        Args:
            runs_on: what attention is exported to: onnxruntime's PackedMultiHeadAttention, which
                it has on CUDA alone, or attention over texts that are padded for it, which costs
                four gathers.

        Raises:
            BaseModelError: the model cannot be packed.
        """
        config: Any = self.model.config
        if config.model_type not in _POSITIONS:
            raise BaseModelError(
                f"export.packed: a model of type {config.model_type!r} cannot be packed, but"
                f" {', '.join(_POSITIONS)}; remove it"
            )
        config._attn_implementation = _NAME
        self._runs_on = runs_on
        return self

    def forward(
        self,
        inputs: dict[str, Tensor],
        adapter_ids: Tensor,
        stacks: list[Tensor],
        adapter_weights: Tensor | None = None,
    ) -> Tensor:
        """As MultiLoraModel's; hidden states and logits of padding are zeros."""
        config: Any = self.model.config
        packing = Packing.of(inputs["attention_mask"])
        self.begin(adapter_ids.index_select(0, packing.rows), stacks, None)
        ids = {name: inputs[name] for name in inputs if name not in _NOT_OF_TOKENS}
        positions = _POSITIONS[config.model_type](ids["input_ids"], config.pad_token_id)
        y = self.run(
            {name: packing.pick(tensor) for name, tensor in ids.items()}
            | {"position_ids": packing.pick(positions)},
            attention_mask=torch.zeros(1, 1, 1, 1),  # of four dimensions: taken as it is
            packing=packing,
            runs_on=self._runs_on,
        )
        return self.finish(packing.restore(y), inputs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing,
    runs_on: str,
    scaling: float,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query, key, value [T, heads, 1, size] -> [T, 1, heads, size]."""
    heads = query.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(1) for x in (query, key, value))
    if runs_on == "cuda" and torch.compiler.is_exporting():
        y = torch.onnx.ops.symbolic(
            _OPERATOR,
            (q, k, v, None, packing.offset, packing.cumulated),
            {"num_heads": heads, "scale": scaling},
            dtype=v.dtype,
            shape=v.shape,
            version=1,
        )
    else:
        y = _repadded(q, k, v, packing, heads, scaling)
    return y.view(y.shape[0], 1, heads, -1), None


def _repadded(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, heads: int, scale: float
) -> Tensor:
    """Attention over texts that are moved to the left and padded; q, k, v [T, n] -> [T, n]."""
    batch, sequence = packing.offset.shape
    bounds = packing.cumulated.to(torch.int64).unsqueeze(1)
    columns = torch.arange(sequence, device=q.device)
    # Behind its end the text's own last token: another's may be inf, and inf * 0 is NaN.
    places = (bounds[:-1] + columns).minimum(bounds[1:] - 1).clamp(min=0).flatten()

    def pad(x: Tensor) -> Tensor:
        return x.index_select(0, places).view(batch, sequence, heads, -1).transpose(1, 2)

    shown = packing.shown[:, None, None].expand(-1, 1, sequence, -1)
    y = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), shown, scale=scale)
    y = y.transpose(1, 2).reshape(batch * sequence, -1)
    return y.index_select(0, packing.offset.flatten()[: q.shape[0]].to(torch.int64))


AttentionInterface.register(_NAME, _attention)
