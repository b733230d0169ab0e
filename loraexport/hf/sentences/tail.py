"""What sentence-transformers computes behind a Hugging Face model, as plain values. No torch.

Of an encoder (task sentence-embedding) that is a pooling and the steps behind it; of a CrossEncoder
(task sequence-classification) the activation of its scores.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from loraexport_runtime.adapters.tensor_files import TensorInfo
from loraexport_runtime.contract.kinds import TensorEntry

from ...errors import BaseModelError

PROMPT_LENGTHS = "prompt_lengths"
"""int64 [batch]: tokens of each text's prompt, with what begins a text, that are not pooled."""
Mode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Activation = Literal["ELU", "GELU", "Identity", "LeakyReLU", "ReLU", "Sigmoid", "SiLU", "Tanh"]
"""Classes of torch.nn that are made without arguments, and act on each number alone."""


@dataclass(frozen=True)
class Dense:
    """y = activation(W x + b), plus x or R x."""

    out_features: int
    activation: Activation
    residual: bool
    tensors: dict[str, TensorInfo]
    """linear.weight, linear.bias unless it has none, and residual.weight if x is turned by R."""


@dataclass(frozen=True)
class LayerNorm:
    """y = weight (x - mean) / sqrt(variance + 1e-5) + bias."""

    tensors: dict[str, TensorInfo]
    """norm.weight and norm.bias."""


@dataclass(frozen=True)
class Normalize:
    """y = x / max(||x||, 1e-12)."""


Step = Dense | LayerNorm | Normalize


@dataclass(frozen=True)
class Sentences:
    """What makes one vector of a text's hidden states."""

    folder: Path
    """Where the model's config, weights and tokenizer are."""
    lower_case: bool
    """Texts are lowercased, whatever the tokenizer does."""
    modes: tuple[Mode, ...]
    """Pooled vectors, side by side."""
    include_prompt: bool
    width: int
    """Of a hidden state."""
    steps: tuple[Step, ...]
    truncate_dim: int | None
    """How many numbers of the vector are kept, at the very end (Matryoshka)."""

    @property
    def out_features(self) -> int:
        """Numbers of a vector."""
        widths = [step.out_features for step in self.steps if isinstance(step, Dense)]
        width = widths[-1] if widths else len(self.modes) * self.width
        return width if self.truncate_dim is None else min(width, self.truncate_dim)

    def inputs(self, inputs: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        """What the graph takes beside the model's own inputs."""
        if self.include_prompt:
            return inputs
        return (*inputs, TensorEntry(PROMPT_LENGTHS, "int64", ("batch",)))

    def outputs(self, outputs: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        """The vector, in place of one as wide as a hidden state."""
        (entry,) = outputs
        if entry.shape[-1] != str(self.width):
            raise BaseModelError(
                f"{self.folder}: its hidden states have {entry.shape[-1]} numbers, and the pooling"
                f" expects {self.width}; the download is of two models"
            )
        return (replace(entry, shape=("batch", str(self.out_features))),)


@dataclass(frozen=True)
class Scores:
    """What a CrossEncoder makes of its logits."""

    folder: Path
    lower_case: bool
    activation: Activation

    def inputs(self, inputs: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        """Those of the model."""
        return inputs

    def outputs(self, outputs: tuple[TensorEntry, ...]) -> tuple[TensorEntry, ...]:
        """The logits; or scores, where they are something else."""
        if self.activation == "Identity":
            return outputs
        (entry,) = outputs
        return (replace(entry, name="scores"),)


Tail = Sentences | Scores
"""What sentence-transformers computes behind a Hugging Face model."""
