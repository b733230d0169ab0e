"""The likeliest tokens of every row -> the one of them that comes next, by chance."""

import numpy as np

from .engine import Sampling


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
