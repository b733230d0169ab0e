"""What a generator gives: a row's pieces as they come, and its completion."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Piece:
    """One token of one row, as it comes, or the row's end."""

    row: int
    token: int | None
    """None of the last piece: the row has ended, and what text was held back comes."""
    text: str
    """What is settled with this token: not half a character, and no beginning of a stop string."""
    finish_reason: Literal["stop", "length"] | None = None
    """Of the row's last piece."""


@dataclass(frozen=True)
class Completion:
    """What one prompt gave, without the end-of-text token; the text without the stop string too."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
