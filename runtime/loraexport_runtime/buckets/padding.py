"""Whether a model gives the same for texts that are filled up on the right, which has to be tried.

Most models with a mask do. One that takes the last token that is not a certain id, or whose
frequencies follow the length of the batch, does not.
"""

from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from ..contract.kinds import Model, TensorEntry
from ..device.dtypes import NUMPY_DTYPES

MASK = "attention_mask"
_TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Of max |y|: what rounding may change. Padding that counts changes far more."""


def can_be_padded(model: Model) -> bool:
    """Whether it is worth a try: a mask says what is padding, and outputs lie as tokens do."""
    entries = {entry.name: entry for entry in model.inputs}
    of_tokens = [entry for entry in entries.values() if "sequence" in entry.shape]
    if MASK not in entries or any(token.dtype != "int64" for token in of_tokens):
        return False
    sizes = [size for output in model.outputs for size in output.shape]
    # Else behind the padding stands what is none.
    return not any("sequence" in size and size != "sequence" for size in sizes)


def are_same(
    model: Model,
    padded: Mapping[str, np.ndarray],
    plain: Mapping[str, np.ndarray],
    tokens: int,
) -> bool:
    """Whether the outputs of one row of so many tokens are those of the same row filled up."""
    for output in model.outputs:
        given = padded[output.name][region(output.shape, 1, tokens)].astype(np.float64)
        expected = plain[output.name].astype(np.float64)
        limit = _TOLERANCES.get(output.dtype, 0.0) * np.abs(expected).max()
        if not np.abs(given - expected).max() <= limit:
            return False
    return True


def sample_inputs(model: Model, rows: int, tokens: int) -> dict[str, np.ndarray]:
    """Some texts or pictures of a size, nothing of them masked."""
    return {entry.name: _sample(entry, rows, tokens) for entry in model.inputs}


def _sample(entry: TensorEntry, rows: int, tokens: int) -> np.ndarray:
    values = np.zeros(entry.sizes(rows, tokens), NUMPY_DTYPES[entry.dtype])
    if entry.name == MASK:
        values[:] = 1
    elif entry.name == "input_ids":
        values[:] = 3 + np.arange(tokens) % 7
    elif entry.name == "position_ids":
        values[:] = np.arange(tokens)
    return values


@lru_cache(4096)
def region(shape: tuple[str, ...], batch: int, sequence: int) -> tuple[slice, ...]:
    """What a batch fills of a tensor that is as large as a bucket."""
    sizes = {"batch": batch, "sequence": sequence}
    return tuple(slice(sizes.get(size)) for size in shape)
