"""What a tail computes, in torch: hidden states -> one vector per text, or logits -> scores."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loraexport_runtime.adapters.tensor_files import read_tensors

from .tail import Dense, LayerNorm, Normalize, Scores, Sentences, Step, Tail


def make_tail(tail: Tail) -> "SentencePooling | ScoreActivation":
    """The module of a tail, its weights in float32.

    Raises:
        WeightsError: its weights are damaged, or hold NaN or Inf.
    """
    if isinstance(tail, Scores):
        return ScoreActivation(tail)
    return SentencePooling(tail)


class ScoreActivation(nn.Module):
    """activation(logits), as CrossEncoder.predict gives it."""

    def __init__(self, scores: Scores) -> None:
        super().__init__()
        self._activation: nn.Module = getattr(nn, scores.activation)()

    def forward(
        self, logits: Tensor, attention_mask: Tensor | None, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """logits [batch, labels] -> scores [batch, labels]; the rest is for sentences alone."""
        y: Tensor = self._activation(logits)
        return y


class SentencePooling(nn.Module):
    """One vector per text, as SentenceTransformer.encode gives it.

    With m the attention mask, t the columns of a text's own tokens, counted from 1 at the first:

    - cls, lasttoken: h of the first or last token with m, whichever side the padding is on
    - max: over tokens with m
    - mean: sum m h / sum m; mean_sqrt_len_tokens: sum m h / sqrt(sum m)
    - weightedmean: sum m t h / sum m t

    Several modes stand side by side. Without the prompt, m is 0 for a text's first prompt_lengths
    tokens. Then come the steps, and of the vector the first truncate_dim numbers, in float32 at
    least.
    """

    def __init__(self, sentences: Sentences) -> None:
        super().__init__()
        self._modes = sentences.modes
        self._include_prompt = sentences.include_prompt
        self._truncate_dim = sentences.truncate_dim
        steps = [_make_step(step) for step in sentences.steps]
        self._steps = steps
        # A list of nn's own, so that their weights are found and cast.
        self.steps = nn.ModuleList([step for step in steps if isinstance(step, nn.Module)])

    def forward(
        self, hidden: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """hidden [batch, sequence, n], attention_mask int64 [batch, sequence], prompt_lengths int64
        [batch], which counts without the prompt alone -> [batch, out]."""
        tokens = _Tokens(hidden, attention_mask, None if self._include_prompt else prompt_lengths)
        vectors = [tokens.pool(mode) for mode in self._modes]
        vector = vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)
        for step in self._steps:
            vector = step(vector)
        if self._truncate_dim is not None:
            vector = vector[:, : self._truncate_dim]
        return vector.to(hidden.dtype)


class _Tokens:
    """The hidden states of a batch, and which of them are pooled."""

    def __init__(
        self, hidden: Tensor, attention_mask: Tensor, prompt_lengths: Tensor | None
    ) -> None:
        self._hidden = hidden
        # A sum over a long text leaves float16's range, and bfloat16 cannot count to 257.
        self._wide = torch.promote_types(hidden.dtype, torch.float32)
        self._all = self._kept = attention_mask
        if prompt_lengths is not None:
            behind = self._columns() >= (self._first(attention_mask) + prompt_lengths).unsqueeze(1)
            self._kept = attention_mask * behind.to(attention_mask.dtype)

    def pool(self, mode: str) -> Tensor:
        """[batch, n], in float32 at least."""
        if mode == "cls":
            first = self._first(self._kept)
            return self._take(torch.where(first < self._kept.shape[1], first, 0))
        if mode == "lasttoken":
            last = (self._columns() * self._kept).amax(1)
            return self._take(last) * self._kept.amax(1, keepdim=True).to(self._wide)
        mask = self._kept.unsqueeze(-1).to(self._hidden.dtype)
        if mode == "max":
            lowest = torch.finfo(self._hidden.dtype).min
            return torch.where(mask > 0, self._hidden, lowest).amax(1).to(self._wide)
        if mode == "weightedmean":
            places = self._columns() + 1 - self._first(self._all).unsqueeze(1)
            weights = (places * self._kept).unsqueeze(-1).to(self._wide)
            total = weights.sum(1).clamp(min=1e-9)
            return (self._hidden.to(self._wide) * weights).sum(1) / total
        total, count = self._sum(self._hidden * mask), self._sum(mask).clamp(min=1e-9)
        return total / (count if mode == "mean" else count.sqrt())

    def _sum(self, x: Tensor) -> Tensor:
        return x.sum(1) if x.dtype == self._wide else x.sum(1, dtype=self._wide)

    def _columns(self) -> Tensor:
        return torch.arange(self._all.shape[1], device=self._all.device)

    def _first(self, mask: Tensor) -> Tensor:
        """[batch]: the column of the first token with the mask; their number if there is none."""
        return torch.where(mask > 0, self._columns(), mask.shape[1]).amin(1)

    def _take(self, columns: Tensor) -> Tensor:
        """Each row's hidden state at its own column, [batch, n]."""
        batch, sequence = self._all.shape
        rows = torch.arange(batch, device=columns.device)
        flat = self._hidden.reshape(batch * sequence, -1)
        return flat.index_select(0, rows * sequence + columns).to(self._wide)


def _make_step(step: Step) -> Callable[[Tensor], Tensor]:
    if isinstance(step, Dense):
        return _Dense(step)
    if isinstance(step, LayerNorm):
        return _LayerNorm(step)
    assert isinstance(step, Normalize), "there is no other step"
    return partial(F.normalize, p=2.0, dim=1)


class _Dense(nn.Module):
    """See Dense."""

    def __init__(self, dense: Dense) -> None:
        super().__init__()
        weights = _read(dense)
        self.weight = weights["linear.weight"]
        self.bias = weights.get("linear.bias")
        self.residual = weights.get("residual.weight")
        self._is_residual = dense.residual
        self._activation: nn.Module = getattr(nn, dense.activation)()

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, in] -> [batch, out]."""
        y: Tensor = self._activation(F.linear(x, self.weight, self.bias))
        if self._is_residual:
            y = y + (x if self.residual is None else F.linear(x, self.residual))
        return y


class _LayerNorm(nn.Module):
    """See LayerNorm."""

    def __init__(self, norm: LayerNorm) -> None:
        super().__init__()
        weights = _read(norm)
        self.weight, self.bias = weights["norm.weight"], weights["norm.bias"]

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, n] -> [batch, n]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


def _read(step: Dense | LayerNorm) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.from_numpy(array.astype("float32")), requires_grad=False)
        for name, array in read_tensors(step.tensors.items()).items()
    }
