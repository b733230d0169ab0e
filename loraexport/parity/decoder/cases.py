"""The prompts and batches on which a decoder is proven."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraexport_runtime.contract.files import resolve
from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.contract.kinds import Decoder
from loraexport_runtime.contract.manifest import Manifest
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ..model.cases import BASE, Mix, only
from ..report import slot_names

STEPS = 8


@dataclass(frozen=True)
class PromptCase:
    """A batch: what each prompt uses, and the prompts, of different lengths."""

    name: str
    rows: tuple[Mix, ...]
    lengths: tuple[int, ...]

    @property
    def adapter_ids(self) -> np.ndarray:
        """int64 [batch]"""
        return np.array([row[0][0] if row else 0 for row in self.rows], dtype=np.int64)


def make_cases(manifest: Manifest) -> tuple[PromptCase, ...]:
    """Every adapter alone, all mixed with the base, base only, one prompt."""
    names = slot_names(manifest)
    slots = sorted(names)
    mixed = (*map(only, slots), BASE, only(slots[0]))
    return (
        *(PromptCase(f"alone-{names[slot]}", (only(slot),) * 2, (5, 9)) for slot in slots),
        PromptCase("mixed", mixed, tuple(4 + 3 * (index % 4) for index in range(len(mixed)))),
        PromptCase("base-only", (BASE, BASE), (3, 8)),
        PromptCase("one-prompt", (only(slots[-1]),), (6,)),
    )


def make_prompts(
    case: PromptCase, vocabulary: int, avoid: Sequence[int], seed: int
) -> list[list[int]]:
    """Random tokens other than those that pad or end a text."""
    generator = np.random.default_rng([seed, *case.lengths])
    allowed = np.setdiff1d(np.arange(vocabulary), avoid)
    return [generator.choice(allowed, length).tolist() for length in case.lengths]


def read_config(folder: Path, decoder: Decoder) -> dict[str, Any]:
    """What onnxruntime-genai is told of the model."""
    config: dict[str, Any] = read_genai_config(resolve(folder, decoder.folder))["model"]
    return config


def empty_cache(config: Mapping[str, Any], batch: int, dtype: str) -> np.ndarray:
    """A layer's keys, or values, of no tokens: [batch, heads, 0, size]."""
    decoder = config["decoder"]
    sizes = (batch, decoder["num_key_value_heads"], 0, decoder["head_size"])
    return np.zeros(sizes, NUMPY_DTYPES[dtype])
