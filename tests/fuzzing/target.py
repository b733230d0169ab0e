"""What a campaign attacks: the names of its targets, and what each of them does."""

import random
import shutil
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path

TARGETS = {
    "specs": "fuzzing.targets:Specs",
    "adapters": "fuzzing.targets:Adapters",
    "artifacts": "fuzzing.targets:Artifacts",
    "bases": "fuzzing.targets:Bases",
    "texts": "fuzzing.text_files:Texts",
    "generators": "fuzzing.text_files:Generators",
    "kills": "fuzzing.crashes:Kills",
    "disks": "fuzzing.crashes:Disks",
    "builds": "fuzzing.targets:Builds",
}
"""Modules and classes by name: only a worker imports them, with all of the exporter."""


class ChangedNumbersError(Exception):
    """An input was accepted, and gives numbers that it must not give."""


class UnavailableError(Exception):
    """This machine cannot try such cases."""


class Target(ABC):
    """One kind of input. `attack` mutates a copy of it and does what a user would do."""

    warm_ups = 3
    """Cases that are tried ahead, so that what a case imports is no part of its time."""
    said = ""
    """What `attack` has changed, in words; set before the product sees it."""

    def __init__(self, home: Path) -> None:
        """
        Args:
            home: a folder of this worker's own, for originals and copies.
        """
        self.home = home
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Write the originals."""

    @abstractmethod
    def attack(self, draw: random.Random) -> str:
        """Try one mutation; what was done. Raises what the input made the product raise."""

    def fresh(self, original: Path) -> Path:
        """A copy of an original; the last one goes."""
        place = self.home / "copies/now"
        shutil.rmtree(self.home / "copies", ignore_errors=True)
        return Path(shutil.copytree(original, place))


def load_target(name: str) -> type[Target]:
    """The class of a target: by its name, or as `module:Class`."""
    module, _, target = TARGETS.get(name, name).partition(":")
    kind: type[Target] = getattr(import_module(module), target)
    return kind
