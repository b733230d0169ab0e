"""Prompts on which a decoder is proven."""

from collections.abc import Sequence

import numpy as np

from loraexport_runtime.checking.model import RowCase


def make_prompts(
    case: RowCase, vocabulary: int, avoid: Sequence[int], seed: int
) -> list[list[int]]:
    """Random tokens other than those that begin or end a text."""
    generator = np.random.default_rng([seed, *case.lengths])
    allowed = np.setdiff1d(np.arange(vocabulary), avoid)
    return [generator.choice(allowed, length).tolist() for length in case.lengths]
