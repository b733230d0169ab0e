"""What gives a batch its next tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

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


class Engine(Protocol):
    """What gives a batch its next tokens."""

    def start(
        self, tokens: Sequence[list[int]], slots: np.ndarray, steps: int, sampling: Sampling
    ) -> Iterator[np.ndarray]:
        """Read the prompts; then the next token of every row at a time, int64 [batch].

        Args:
            tokens: of each prompt, one at least.
            slots: int64 [batch], of each row's adapter.
            steps: how many tokens at most; what follows the end of a row is not looked at.
        """

    def warm_up(self, rows: int, length: int) -> None:
        """Prepare for batches of this size; length: prompt and new tokens together."""

    def close(self) -> None:
        """Give memory and threads up; no call runs, and none comes any more."""
