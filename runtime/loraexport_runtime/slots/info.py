"""What is told of adapters and slots: where an adapter is, and what the slots have done."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from .table import SlotTable


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter: where it is, and where it comes from."""

    slot: int | None
    """None: in host memory only; the next run that names it pages it in."""
    pinned: bool
    """It keeps a slot until it is unpinned."""
    ranks: Mapping[str, int]
    """By site."""
    digest: str
    """sha256 over its adapter_config.json and adapter_model.safetensors, as hexadecimal text."""
    scale: float
    """What multiplies its scaling: the spec's for a carried adapter, times `load_adapter`'s."""
    path: Path | None
    """The directory as `load_adapter` was given it; None: the artifact carries it."""
    generation: int
    """1 from the start; each later load in this session has a greater number than any before it, so
    that a name's grows with each replacement, also when it was unloaded meanwhile."""
    leases: int = 0
    """Runs, and answers of a decoder, that hold its slot now."""

    @classmethod
    def of(cls, table: SlotTable, name: str) -> Self:
        """That of an adapter in a table; whoever guards it holds its lock."""
        adapter, slot = table.adapters[name], table.slots.get(name)
        return cls(
            slot,
            name in table.pinned,
            adapter.ranks,
            adapter.digest,
            adapter.scale,
            adapter.path,
            table.generations[name],
            0 if slot is None else table.num_leases(slot),
        )


@dataclass(frozen=True)
class SlotCounts:
    """What a pool of slots has done so far; see `SessionStats`."""

    slots_held: int
    hits: int
    pages: int
    evictions: int
    waits: int
    wait_seconds: float
    runs: int
    run_seconds: float
