"""The tokens of a batch, held to the tables in which a model looks them up.

An id beyond a table ends the whole batch with onnxruntime's own error, and a negative one is read
from the table's end; on CUDA both give numbers. Ids in CUDA memory are not looked at.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..contract.kinds import Facts
from ..device.memory import host_view
from ..errors import InputError

_POSITIONS = "position_ids"


def check_tokens(inputs: Mapping[str, Any], facts: Facts, sequence: int) -> None:
    """Hold a model's ids, int64 [batch, sequence] each, and the length to what the facts say.

    Raises:
        InputError: an id is negative or beyond its table, or the rows are too long for the table
            of positions; with the row and the column.
    """
    if _POSITIONS not in inputs and "input_ids" in inputs:
        check_length(sequence, facts.positions, "input_ids")
    _check_ids(inputs, "input_ids", facts.vocab_size, "vocabulary. Use the tokenizer of this model")
    _check_ids(inputs, "token_type_ids", facts.type_vocab_size, "kinds of tokens")
    _check_ids(inputs, _POSITIONS, facts.positions, "positions. Give shorter texts")
    if "bbox" in inputs and facts.max_box is not None:
        _check_boxes(inputs["bbox"], facts.max_box)


def check_length(sequence: int, positions: int | None, subject: str) -> None:
    """Raise InputError for rows that are longer than the model has positions."""
    if positions is not None and sequence > positions:
        raise InputError(
            f"{subject} has rows of {sequence} tokens, padding too, and this model has positions"
            f" for {positions}: none for column {positions} of row 0 and what follows. Cut the"
            " texts, as the tokenizer's truncation does"
        )


def _check_ids(inputs: Mapping[str, Any], name: str, size: int | None, table: str) -> None:
    ids = host_view(inputs[name]) if size is not None and name in inputs else None
    # A negative id is huge as an unsigned number.
    if ids is None or size is None or ids.dtype != np.int64 or ids.view(np.uint64).max() < size:
        return
    row, column = np.argwhere((ids < 0) | (ids >= size))[0].tolist()
    raise InputError(
        f"{name}[{row}, {column}] is {ids[row, column]}; expected 0 to {size - 1}, the model's"
        f" {table}"
    )


def _check_boxes(tensor: Any, most: int) -> None:
    """Raise InputError for a token's box beyond the page, or of a width or height below 0."""
    boxes = host_view(tensor)
    if boxes is None:
        return
    wrong = (boxes < 0) | (boxes > most)
    wrong[..., 2:] |= boxes[..., 2:] < boxes[..., :2]
    if wrong.any():
        row, column, _ = np.argwhere(wrong)[0].tolist()
        raise InputError(
            f"bbox[{row}, {column}] is {boxes[row, column].tolist()}; expected [x0, y0, x1, y1]"
            f" with x0 <= x1 and y0 <= y1, all of them 0 to {most}"
        )
