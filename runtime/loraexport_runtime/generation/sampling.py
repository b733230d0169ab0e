"""The likeliest tokens of every row -> the one of them that comes next, by chance."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, with onnxruntime-genai's meaning of every option."""

    temperature: float = 0.0
    """0 takes the likeliest token always."""
    top_k: int = 50
    """Of so many of the likeliest; 0: of all."""
    top_p: float = 1.0
    """Of the fewest of these that have this share of their probability."""
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature <= 0 or self.top_k == 1

    def num_candidates(self, vocabulary: int) -> int:
        """How many of the likeliest tokens `choose` has to see."""
        return min(self.top_k or vocabulary, vocabulary)


def choose(
    sampling: Sampling, logits: np.ndarray, tokens: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """The next token of every row by chance, int64 [batch].

    Args:
        sampling: not greedy.
        logits: float32 [batch, candidates], from the highest down.
        tokens: int64 [batch, candidates]: whose logits these are.
    """
    scaled = (logits.astype(np.float64) - logits[:, :1]) / sampling.temperature
    share = np.exp(scaled)
    share /= share.sum(axis=1, keepdims=True)
    before = np.cumsum(share, axis=1) - share
    share[:, 1:][before[:, 1:] >= sampling.top_p] = 0.0  # the first one always stays
    reached = np.cumsum(share, axis=1)
    drawn = random.random(len(tokens))[:, None] * reached[:, -1:]
    chosen = (reached <= drawn).sum(axis=1, keepdims=True)
    return np.take_along_axis(tokens, chosen, axis=1)[:, 0]
