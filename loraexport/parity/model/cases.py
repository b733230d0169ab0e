"""Inputs of the batches on which a whole model is proven."""

from collections.abc import Sequence

import numpy as np

from loraexport_runtime.checking.model import Inputs, RowCase
from loraexport_runtime.contract.kinds import TensorEntry
from loraexport_runtime.device.dtypes import NUMPY_DTYPES


def make_inputs(
    case: RowCase, entries: Sequence[TensorEntry], vocabulary: int, seed: int, pad: int = 0
) -> Inputs:
    """Random ids other than `pad`, and the masks that the lengths and the padding's side ask for.

    Images are standard normal, one per row; lengths mean nothing to them.
    Some models (RoBERTa) find positions, others (Llama, to classify) the last token, by `pad`.
    """
    generator = np.random.default_rng([seed, len(case.rows), *case.lengths, int(case.left)])
    shape = (len(case.rows), max(case.lengths))
    for entry in entries:
        if entry.name == "pixel_values":
            pixels = generator.standard_normal(entry.sizes(*shape))
            return {entry.name: pixels.astype(NUMPY_DTYPES[entry.dtype])}
    mask = np.zeros(shape, np.int64)
    for row, length in enumerate(case.lengths):
        mask[row, -length if case.left else 0 : None if case.left else length] = 1
    ids = generator.integers(0, vocabulary - 1, shape)
    values = {
        "input_ids": np.where(mask == 1, ids + (ids >= pad), pad),
        "attention_mask": mask,
        "token_type_ids": np.zeros(shape, np.int64),
        "position_ids": np.tile(np.arange(shape[1]), (shape[0], 1)),
    }
    return {entry.name: values[entry.name] for entry in entries}
