"""How many rows a decoder's cache has, and how long they are: as asked for, or as memory allows."""

import os
from typing import Any

import numpy as np

from ...device.cuda_libraries import free_memory
from ...device.dtypes import NUMPY_DTYPES
from ...errors import InputError
from .decoder_graph import DecoderGraph

LENGTHS = 256
"""A cache's length is a multiple of this, or the model's whole context."""
_ROWS = {"cpu": 8, "cuda": 32}
"""As many as there are by default, if memory allows."""
_SHARE = 0.5
"""Of the memory that is free, for a cache whose size was not asked for."""
_FEWEST = 4
"""Rows that shall be there before they are as long as the model's context."""


def choose_sizes(
    graph: DecoderGraph, context: int, rows: int | None, length: int | None
) -> tuple[int, int]:
    """(rows, length) of the cache.

    Args:
        context: the most tokens that the model takes.
        rows: default: as many as half of the free memory holds, up to 8 on a CPU and 32 on CUDA.
        length: tokens of a prompt and its answer, rounded up to a multiple of 256; default: the
            context, or less where four rows of it were more than that half.

    Raises:
        InputError: one is no number from 1 on, or the length is more than the context.
    """
    for name, value in (("rows", rows), ("length", length)):
        if value is not None and not _is_count(value):
            raise InputError(f"{name} is {value!r}; expected a whole number from 1 on")
    if length is not None and length > context:
        raise InputError(f"length is {length}; the model takes {context} tokens at most")
    room = _SHARE * _free(graph.device)
    itemsize = NUMPY_DTYPES[graph.cache_dtype].itemsize
    per_token = len(graph.present) * graph.heads * graph.head_size * itemsize
    if length is None:
        length = context
        while length > LENGTHS and (rows or _FEWEST) * length * per_token > room:
            length //= 2
    length = min(-(-int(length) // LENGTHS) * LENGTHS, context)
    if rows is None:
        rows = _ROWS[graph.device[0]]
        while rows > 1 and rows * length * per_token > room:
            rows //= 2
    return int(rows), length


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_number and int(value) >= 1


def _free(device: tuple[str, int]) -> int:
    """Bytes."""
    if device[0] == "cpu":
        pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    return free_memory(device[1])
