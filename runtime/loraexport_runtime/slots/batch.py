"""Adapter names per segment -> `seg_indptr` and `seg_slots`, per row -> `adapter_ids`; checked."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, TypeGuard

import numpy as np

from ..errors import InputError, SegmentsError

RowAdapters = str | Mapping[str, float] | None
"""One adapter, a blend of several with their weights, or the base."""

_PLAIN = {str, type(None)}
_PLAIN_SEGMENTS = ([str, int], [type(None), int])

Segments = Sequence[tuple[str | None, int]]
"""(adapter name or None for the base, number of tokens) in the order of the tokens."""


def read_segments(segments: Any, num_tokens: int) -> list[tuple[str | None, int]]:
    """Named segments as a list, checked.

    Raises:
        SegmentsError: an entry is no pair of a name and a length, or the lengths do not sum to
            num_tokens.
    """
    try:
        entries = list(segments)
    except TypeError as error:
        raise SegmentsError(
            f"segments: expected a list of (adapter name or None, number of tokens), got"
            f" {segments!r}"
        ) from error
    pairs = []
    for index, entry in enumerate(entries):
        if not _is_segment(entry):
            raise SegmentsError(
                f"segments[{index}] is {entry!r}; expected a pair: an adapter's name, or None for"
                " the base, and its number of tokens, 0 or more"
            )
        pairs.append((entry[0], int(entry[1])))
    _check_sum(sum(length for _, length in pairs), num_tokens)
    return pairs


def segment_arrays(
    segments: Segments, slots: Mapping[str | None, int]
) -> tuple[np.ndarray, np.ndarray]:
    """`seg_indptr int64 [n + 1]` and `seg_slots int64 [n]` for what `read_segments` gave."""
    ends = accumulate((length for _, length in segments), initial=0)
    seg_indptr = np.fromiter(ends, np.int64, len(segments) + 1)
    return seg_indptr, np.array([slots[name] for name, _ in segments], dtype=np.int64)


def check_segments(seg_indptr: np.ndarray, seg_slots: np.ndarray, num_tokens: int) -> None:
    """Hold arrays to the contract: monotone from 0 to num_tokens, one slot per segment.

    Raises:
        SegmentsError: they break it.
    """
    for name, array in (("seg_indptr", seg_indptr), ("seg_slots", seg_slots)):
        if not isinstance(array, np.ndarray):
            raise SegmentsError(
                f"{name} is of type {type(array).__name__}; expected a numpy array, int64 with one"
                " dimension"
            )
        if array.dtype != np.int64 or array.ndim != 1:
            raise SegmentsError(
                f"{name} is {array.dtype} with shape {list(array.shape)}; expected int64 with one"
                " dimension"
            )
    if len(seg_indptr) != len(seg_slots) + 1:
        raise SegmentsError(
            f"seg_indptr has {len(seg_indptr)} entries for the {len(seg_slots)} segments of"
            " seg_slots; expected one entry more than segments"
        )
    if seg_indptr[0] != 0:
        raise SegmentsError(f"seg_indptr starts at {int(seg_indptr[0])}; expected 0")
    falls = np.flatnonzero(seg_indptr[1:] < seg_indptr[:-1])  # a difference could overflow
    if len(falls):
        low, high = int(falls[0]), int(falls[0]) + 1
        raise SegmentsError(
            f"seg_indptr falls from {int(seg_indptr[low])} at entry {low} to"
            f" {int(seg_indptr[high])} at entry {high}; expected offsets that never fall"
        )
    _check_sum(int(seg_indptr[-1]), num_tokens)


def read_rows(adapters: Any, batch: int) -> list[RowAdapters]:
    """What each row of a batch uses, checked.

    Raises:
        InputError: an entry is no name, no blend and no None, a weight is no finite number, or
            the entries do not match the rows.
    """
    if not isinstance(adapters, list) and (
        isinstance(adapters, str | Mapping) or not isinstance(adapters, Iterable | None)
    ):
        raise InputError(
            f"adapters is {adapters!r}; expected a list with an entry for each of the {batch} rows"
        )
    rows = [None] * batch if adapters is None else list(adapters)
    if len(rows) != batch:
        raise InputError(
            f"adapters names {len(rows)} rows, but the inputs have {batch}; give one name, or"
            " None for the base, for each row"
        )
    for index, row in enumerate([] if are_plain(rows) else rows):
        if row is not None and not isinstance(row, str | Mapping):
            raise InputError(
                f"adapters[{index}] is {row!r}; expected an adapter's name, a blend such as"
                " {'a': 0.7, 'b': 0.3}, or None for the base"
            )
        for name, weight in row.items() if isinstance(row, Mapping) else ():
            if not isinstance(name, str) or not is_weight(weight):
                raise InputError(
                    f"adapters[{index}]: weight {weight!r} of adapter {name!r}; expected a finite"
                    " number, as float32 holds it, for each name"
                )
    return rows


def are_plain(rows: Sequence[RowAdapters]) -> TypeGuard[Sequence[str | None]]:
    """Whether no row blends: what most batches are, and quickly told."""
    return _PLAIN.issuperset(map(type, rows))


def row_names(rows: Sequence[RowAdapters]) -> list[str]:
    """Every adapter that the rows name."""
    if are_plain(rows):
        return [name for name in rows if name is not None]
    return [
        name
        for row in rows
        for name in (row if isinstance(row, Mapping) else [row])
        if name is not None
    ]


def tenant_of(names: Iterable[str], tenant: str | None) -> str | None:
    """Whose turn a request takes in a queue: its adapters', where nobody is named."""
    return "+".join(sorted({*names})) or None if tenant is None else tenant


def row_arrays(
    rows: Sequence[RowAdapters], slots: Mapping[str | None, int], num_slots: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """`adapter_ids int64 [batch]`, and `adapter_weights float32 [batch, slots]` if a row blends."""
    if are_plain(rows):
        return np.array([slots[name] for name in rows], dtype=np.int64), None
    ids = [0 if isinstance(row, Mapping) else slots[row] for row in rows]
    shares = [
        [(slots[name], weight) for name, weight in row.items()] if isinstance(row, Mapping) else []
        for row in rows
    ]
    blends = any(isinstance(row, Mapping) for row in rows)
    return np.array(ids, dtype=np.int64), weight_rows(shares, num_slots) if blends else None


def weight_rows(rows: Sequence[Iterable[tuple[int, float]]], num_slots: int) -> np.ndarray:
    """`adapter_weights float32 [batch, slots]` of rows of (slot, weight)."""
    weights = np.zeros((len(rows), num_slots), dtype=np.float32)
    for index, row in enumerate(rows):
        for slot, weight in row:
            weights[index, slot - 1] = weight
    return weights


def is_weight(weight: Any) -> bool:
    """Whether it is a finite number, as float32 holds it."""
    value = weight.item() if isinstance(weight, np.number) else weight
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= float(np.finfo(np.float32).max)  # NaN is not


def _is_segment(entry: Any) -> bool:
    if type(entry) is tuple and [*map(type, entry)] in _PLAIN_SEGMENTS:  # most, and quickly told
        return bool(entry[1] >= 0)
    if not isinstance(entry, tuple | list) or len(entry) != 2:
        return False
    name, length = entry
    is_number = isinstance(length, int | np.integer) and not isinstance(length, bool)
    return (name is None or isinstance(name, str)) and is_number and length >= 0


def _check_sum(covered: int, num_tokens: int) -> None:
    if covered != num_tokens:
        raise SegmentsError(
            f"the segments cover {covered} tokens, but the input has {num_tokens}; make their"
            " lengths sum to the number of tokens"
        )
