"""The sizes that `warm_up` is given, held to what they may be."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import InputError


def check_sizes(sizes: Any, label: str, num_parts: int) -> list[tuple[int, ...]]:
    """The sizes that `warm_up` was given, each as a tuple of `num_parts` numbers.

    Raises InputError.
    """
    expected = f"expected a list such as {[64, 512] if num_parts == 1 else [(32, 128), (64, 512)]}"
    if isinstance(sizes, str | Mapping | int | np.integer) or not hasattr(sizes, "__iter__"):
        raise InputError(f"warm_up: {sizes!r}; {expected}, of {label}")
    checked = []
    for index, size in enumerate(sizes):
        parts = size if isinstance(size, tuple | list) else (size,)
        if len(parts) != num_parts or not all(map(_is_count, parts)):
            raise InputError(f"warm_up: sizes[{index}] is {size!r}; {expected}, of {label}")
        checked.append(tuple(int(part) for part in parts))
    return checked


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) > 0
