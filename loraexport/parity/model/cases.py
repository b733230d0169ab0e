"""Inputs of the batches on which a whole model is proven."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraexport_runtime.checking.model import Inputs, RowCase
from loraexport_runtime.contract.kinds import TensorEntry
from loraexport_runtime.device.dtypes import NUMPY_DTYPES

from ...hf.sentences.tail import PROMPT_LENGTHS


@dataclass(frozen=True)
class Contents:
    """What the inputs of a model may hold; 0 for what it does not take."""

    vocabulary: int
    pad: int
    """The id that fills up shorter texts."""
    end: int | None = None
    """The id of the last token of every text, where the model looks for it."""
    max_box: int = 0
    """The largest coordinate of a token's box."""


def make_inputs(
    case: RowCase, entries: Sequence[TensorEntry], contents: Contents, seed: int
) -> Inputs:
    """Random ids other than the padding, and the masks that the lengths and its side ask for.

    Pixels, samples and spectrograms are standard normal, one per row; lengths mean nothing to those
    of a fixed size, and samples of padding are 0, as processors make them.
    Some models (RoBERTa) find positions, others (Llama, to classify) the last token, by `pad`.
    """
    generator = np.random.default_rng([seed, len(case.rows), *case.lengths, int(case.left)])
    shape = (len(case.rows), max(case.lengths))
    mask = np.zeros(shape, np.int64)
    for row, length in enumerate(case.lengths):
        mask[row, -length if case.left else 0 : None if case.left else length] = 1
    values = {
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
        "position_ids": np.tile(np.arange(shape[1]), (shape[0], 1)),
    }
    names = {entry.name for entry in entries}
    if "input_ids" in names:
        ids = generator.integers(0, contents.vocabulary - 1, shape)
        values["input_ids"] = np.where(mask == 1, ids + (ids >= contents.pad), contents.pad)
        if contents.end is not None:
            last = np.where(mask == 1, np.arange(shape[1]), 0).argmax(1)
            values["input_ids"][np.arange(shape[0]), last] = contents.end
    if "bbox" in names:
        corners = generator.integers(0, contents.max_box + 1, (2, *shape, 2))
        values["bbox"] = np.concatenate(np.sort(corners, axis=0), axis=-1) * mask[..., None]
    if PROMPT_LENGTHS in names:
        lengths = np.array(case.lengths, np.int64)
        values[PROMPT_LENGTHS] = generator.integers(0, lengths)  # something is left of each text
    for entry in entries:
        if entry.dtype != "int64":
            numbers = generator.standard_normal(entry.sizes(*shape))
            numbers = numbers * mask if numbers.shape == mask.shape else numbers
            values[entry.name] = numbers.astype(NUMPY_DTYPES[entry.dtype])
    return {entry.name: values[entry.name] for entry in entries}
