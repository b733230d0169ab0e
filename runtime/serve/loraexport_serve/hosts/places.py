"""Folders that a request may name: below some roots alone, wherever their links lead."""

from collections.abc import Sequence
from pathlib import Path


def find_below(text: str, places: Sequence[str], roots: Sequence[str] = ()) -> Path | None:
    """The folder that a text names in one of some places, with all links followed.

    Args:
        text: a path in one of the places, or an absolute one below it.
        roots: folders that links may lead into, beside the places.

    Returns:
        None: it is not there, or elsewhere, which are not told apart.
    """
    starts = [Path(place).resolve() for place in places]
    allowed = [*starts, *(Path(root).resolve() for root in roots)]
    for start in starts:
        try:
            path = (start / text).resolve()
            is_there = path.is_dir()
        except (OSError, ValueError, RuntimeError):  # no path, or links in a circle
            continue
        if is_there and any(root in path.parents for root in allowed):
            return path
    return None
