"""An inspected adapter as a table for people and as a dictionary for programs."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from loraexport_runtime.adapters.header import AdapterHeader

from ..hf.moves import Delta, Move
from .console import make_table, print_line

_NAMED = 4


def deltas_dict(header: AdapterHeader, deltas: Sequence[Delta]) -> dict[str, Any]:
    """An adapter by itself, as JSON types."""
    return _header_dict(header) | {"modules": {delta.name: _delta_dict(delta) for delta in deltas}}


def moves_dict(header: AdapterHeader, base: str, moves: Sequence[Move]) -> dict[str, Any]:
    """An adapter against a base, as JSON types."""
    sites = {
        move.site: {"module": move.delta.name}
        | _delta_dict(move.delta)
        | {"base_norm": move.base_norm, "norm": move.norm, "percent": move.percent}
        for move in moves
    }
    return _header_dict(header) | {"base": base, "sites": sites}


def print_moves(header: AdapterHeader, base: str, moves: Sequence[Move], console: Console) -> None:
    """One row a site: its weight, how far the adapter moves it, and their ratio."""
    trained = f", trained on {header.base_model}" if header.base_model else ""
    print_line(console, f"{header.path} on {base}{trained}")
    table = make_table("site", "rank", "scaling", "norm\nW", "norm\nmove", "\n%")
    for move in moves:
        delta = move.delta
        table.add_row(
            move.site,
            str(delta.module.rank),
            f"{delta.module.scaling:g}",
            f"{move.base_norm:.4g}",
            f"{move.norm:.4g}",
            "" if move.percent is None else f"{move.percent:.3g}",
        )
    console.print(table)
    for name, saved in header.saved.items():
        line = f"trained whole: {name} [{saved.out_features}, {saved.in_features}]"
        print_line(console, line)


def describe_zeros(deltas: Sequence[Delta]) -> str | None:
    """One line that names the modules that add nothing; None if every one adds something."""
    zeros = [delta.name for delta in deltas if delta.adds_nothing]
    if not zeros:
        return None
    names = ", ".join(zeros[:_NAMED]) + (", …" if len(zeros) > _NAMED else "")
    return f"{len(zeros)} of {len(deltas)} modules add nothing, their B is all zero: {names}"


def _header_dict(header: AdapterHeader) -> dict[str, Any]:
    return {
        "adapter": str(header.path),
        "base_model": header.base_model,
        "rslora": header.rslora,
        "max_rank": header.max_rank,
        "features": list(header.features),
        "heads": {
            name: [saved.out_features, saved.in_features] for name, saved in header.saved.items()
        },
    }


def _delta_dict(delta: Delta) -> dict[str, Any]:
    return {
        "rank": delta.module.rank,
        "in": delta.module.in_features,
        "out": delta.module.out_features,
        "scaling": delta.module.scaling,
        "embedding": delta.module.is_embedding,
        "delta_norm": delta.norm,
        "dora": delta.module.magnitude is not None,
    }
