"""How a build tells where it is."""

from collections.abc import Callable

Progress = Callable[[str], None]
