"""How a build tells where it is."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch
    pass


Progress = Callable[[str], None]
