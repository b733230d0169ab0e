"""A target that breaks in a way that its seed draws: what a campaign has to find."""

import os
import random
import signal
from pathlib import Path

from loraexport_runtime.errors import AdapterError

from .target import ChangedNumbersError, Target

WAYS = ("accepted", "refused", "untyped", "memory", "changed", "code", "hang", "died")


def way_of(seed: int) -> str:
    """What `Broken` does for a seed."""
    return random.Random(seed).choice(WAYS)


class Broken(Target):
    """Ends in each way that a case can end; the first three, which warm up, are accepted."""

    def prepare(self) -> None:
        self.sound = 3

    def attack(self, draw: random.Random) -> str:
        self.said = draw.choice(WAYS)
        if self.sound:
            self.sound -= 1
            return self.said
        if self.said == "refused":
            raise AdapterError("no such adapter")
        if self.said == "untyped":
            raise ValueError("raw")
        if self.said == "memory":
            raise MemoryError
        if self.said == "changed":
            raise ChangedNumbersError("rows have moved")
        if self.said == "code":
            Path(os.environ["CANARY"]).touch()
        elif self.said == "hang":
            signal.pause()
        elif self.said == "died":
            os._exit(3)
        return self.said
