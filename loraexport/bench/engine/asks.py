"""What is asked of an engine: lengths and adapters from a seed, tokens from another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraexport_runtime.generation.request import GenerationRequest

from ..workloads.batches import draw_slots
from ..workloads.schema import EngineWorkload, Traffic

FIRST_TOKEN = 3
"""0 is padding, and 1 and 2 start and end a text by default."""


@dataclass(frozen=True)
class Ask:
    """A prompt, the slot of its adapter, and how many tokens shall follow."""

    tokens: np.ndarray
    """int64 [n]."""
    slot: int
    new_tokens: int

    def request(self) -> GenerationRequest:
        return GenerationRequest(
            tokens=self.tokens.tolist(),
            adapter=str(self.slot) if self.slot else None,
            max_tokens=self.new_tokens,
            ignore_eos=True,
        )


def draw_traffic(
    workload: EngineWorkload, traffic: Traffic, adapters: int, vocabulary: int, seed: int, turn: int
) -> list[Ask]:
    """The requests of one round: the same lengths in each, and other tokens, which no row of a
    cache holds already.

    A length is drawn log-uniform: the logarithm of it is uniform between the bounds.
    """
    generator = np.random.default_rng(seed)
    prompts, news = (
        log_uniform(generator, bounds, traffic.requests)
        for bounds in (traffic.prompt_tokens, traffic.new_tokens)
    )
    slots = draw_slots(workload.distribution, traffic.requests, adapters, seed)
    tokens = np.random.default_rng([seed, turn])
    return [
        Ask(draw_tokens(tokens, size, vocabulary), slot, new)
        for size, new, slot in zip(prompts, news, slots, strict=True)
    ]


def log_uniform(generator: np.random.Generator, bounds: Sequence[int], count: int) -> list[int]:
    """Whole numbers from the first bound to the second one, both included."""
    low, high = bounds
    logs = generator.uniform(np.log(low), np.log(high + 1), count)
    return [min(high, int(number)) for number in np.exp(logs)]


def draw_tokens(generator: np.random.Generator, size: int, vocabulary: int) -> np.ndarray:
    """int64 [size]."""
    return generator.integers(FIRST_TOKEN, vocabulary, size)
