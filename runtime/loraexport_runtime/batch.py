"""Adapter names per segment -> `seg_indptr` and `seg_slots`, checked."""

from collections.abc import Mapping, Sequence

import numpy as np

from .errors import SegmentsError

Segments = Sequence[tuple[str | None, int]]
"""(adapter name or None for the base, number of tokens) in the order of the tokens."""


def segment_arrays(
    segments: Segments, slots: Mapping[str | None, int], num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """`seg_indptr int64 [n + 1]` and `seg_slots int64 [n]` for named segments.

    Raises:
        SegmentsError: a length is negative or no integer, or the lengths do not sum to num_tokens.
    """
    for name, length in segments:
        if isinstance(length, bool) or not isinstance(length, int | np.integer) or length < 0:
            raise SegmentsError(
                f"segment {name!r} has length {length!r}; expected a number of tokens, 0 or more"
            )
    seg_indptr = np.zeros(len(segments) + 1, dtype=np.int64)
    np.cumsum([length for _, length in segments], out=seg_indptr[1:])
    seg_slots = np.array([slots[name] for name, _ in segments], dtype=np.int64)
    check_segments(seg_indptr, seg_slots, num_tokens)
    return seg_indptr, seg_slots


def check_segments(seg_indptr: np.ndarray, seg_slots: np.ndarray, num_tokens: int) -> None:
    """Hold arrays to the contract: monotone from 0 to num_tokens, one slot per segment.

    Raises:
        SegmentsError: they break it.
    """
    for name, array in (("seg_indptr", seg_indptr), ("seg_slots", seg_slots)):
        if array.dtype != np.int64 or array.ndim != 1:
            raise SegmentsError(
                f"{name} is {array.dtype} with {array.ndim} dimensions; expected int64 with one"
            )
    if len(seg_slots) == 0 or len(seg_indptr) != len(seg_slots) + 1:
        raise SegmentsError(
            f"seg_indptr has {len(seg_indptr)} entries for {len(seg_slots)} segments;"
            " expected one more than segments, and at least one segment"
        )
    if seg_indptr[0] != 0 or (np.diff(seg_indptr) < 0).any():
        raise SegmentsError(f"seg_indptr {seg_indptr.tolist()} must start at 0 and never fall")
    if seg_indptr[-1] != num_tokens:
        raise SegmentsError(
            f"the segments cover {int(seg_indptr[-1])} tokens, but the input has {num_tokens}"
        )
