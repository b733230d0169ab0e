"""What bench.json holds: the environment, a cell for every shape of every workload, and cases of
the engine."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from loraexport_runtime.contract.foreign import MAX_BYTES, read_bounded

from ..errors import UsageError
from .workloads.schema import Workloads


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Timing(_Model):
    """Seconds per unit of a cell, over rounds that alternate the contestants."""

    median: float
    """On CUDA between two events on the device's stream around a round's calls, else wall time."""
    lower: float
    """First quartile of the rounds."""
    upper: float
    """Third quartile."""
    wall: float
    """Median of the wall time, host work included."""
    rounds: int
    calls: int
    """In each round."""


class Floor(_Model):
    """What the sites of a batch have to move and to compute at least, per unit of the cell."""

    bytes: int
    """Weights read once, activations read and written once."""
    flops: int
    seconds: float | None
    """The larger of both at the device's peak; None where that is not known."""


class Entry(_Model):
    """One contestant in one cell."""

    name: str
    group: Literal["base", "mixed"]
    timing: Timing
    difference: float
    """max |y - y0| / max |y0|, y0 of the first contestant of its group; tokens: share of rows."""


class Cell(_Model):
    """One shape of a workload: the same inputs for every contestant."""

    workload: str
    kind: Literal["layers", "model", "generation"]
    phase: Literal["", "prefill", "decode"]
    unit: Literal["layer", "batch", "step"]
    adapters: int
    used: int
    """Different adapters in the batch."""
    rank: int
    """The largest, where adapters differ."""
    ranks: tuple[int, ...] = ()
    """Those that the adapters take in turn, where they differ."""
    rows: int
    tokens: int
    """All rows together."""
    ours: str | None = None
    """The contestant that stands for this project: what it would choose here."""
    floors: dict[Literal["base", "mixed"], Floor]
    entries: tuple[Entry, ...] = ()
    left_out: dict[str, str] = {}
    """Contestant -> why it did not run."""

    def seconds(self, name: str | None) -> float | None:
        """The median of a contestant, if it ran."""
        return next((entry.timing.median for entry in self.entries if entry.name == name), None)

    @property
    def rank_label(self) -> str:
        """`rank 16`, or `ranks 8 to 128` where adapters differ."""
        if not self.ranks:
            return f"rank {self.rank}"
        return f"ranks {min(self.ranks)} to {max(self.ranks)}"

    @property
    def fastest_base(self) -> str | None:
        """Who ran the base alone in the least time, in whatever way."""
        bases = [entry for entry in self.entries if entry.group == "base"]
        return min(bases, key=lambda entry: entry.timing.median).name if bases else None


class Figure(_Model):
    """One figure of a case of the engine."""

    name: str
    unit: Literal["ratio", "count", "ms", "s", "tokens/s"]
    value: float


class EngineCase(_Model):
    """What requests that join and leave the running batch came to."""

    workload: str
    case: Literal["traffic", "arrival", "chat"]
    adapters: int
    rank: int
    rows: int
    figures: tuple[Figure, ...]
    left_out: dict[str, str] = {}
    """Contestant -> why it did not run."""


class Results(_Model):
    """A whole run."""

    format: Literal[1] = 1
    environment: dict[str, str]
    workloads: Workloads
    cells: tuple[Cell, ...]
    engines: tuple[EngineCase, ...] = ()
    disagreements: tuple[str, ...] = ()
    """Cells that were not timed, because contestants gave different numbers."""


def read_results(path: Path) -> Results:
    """Read a bench.json.

    Raises:
        UsageError: it is none, or of another version.
    """
    try:
        return Results.model_validate_json(read_bounded(path, MAX_BYTES))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; give the bench.json of a run") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(
            f"{path}: no results of this version of 'loraexport bench': {where}: {first['msg']};"
            " run it again"
        ) from error
