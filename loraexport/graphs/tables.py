"""The tables that an ONNX graph looks its tokens up in: how many ids each of them has."""

import re
from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from loraexport_runtime.contract.kinds import Facts

_SHAPERS = ("Reshape", "Cast", "Identity", "Unsqueeze")
"""What ids go through unchanged."""
_POSITIONS = re.compile(
    r"(^|[./])(position_embeddings?|positions_embed|embed_positions|wpe)([./]|$)"
)
"""In the name of a table of positions, as transformers' modules have it."""


def table_rows(graph: ir.Graph, name: str) -> int | None:
    """The ids that an input may hold: rows of the smallest table that it is looked up in.

    None: there is no such input, or no table.
    """
    same = [value for value in graph.inputs if value.name == name]
    rows: list[int] = []
    for value in same:
        for user, place in value.uses():
            if user.op_type in _SHAPERS:
                same += user.outputs
            elif user.op_type == "Gather" and place == 1:
                rows += _rows(user.inputs[0])
    return min(rows, default=None)


def with_tables(facts: Facts, graph: ir.Graph) -> Facts:
    """What the config files say, where the graph's tables do not say less."""
    positions = table_rows(graph, "position_ids")
    if positions is None:
        positions = _least(facts.positions, _position_rows(graph))
    return replace(
        facts,
        vocab_size=_least(facts.vocab_size, table_rows(graph, "input_ids")),
        positions=positions,
        type_vocab_size=_least(facts.type_vocab_size, table_rows(graph, "token_type_ids")),
    )


def _position_rows(graph: ir.Graph) -> int | None:
    """The rows of a table of positions that the graph counts itself, by the table's name."""
    nodes = list(graph)
    if any(node.op_type == "CumSum" for node in nodes):
        return None  # as RoBERTa counts: the first rows are of no token
    tables = [node.inputs[0] for node in nodes if node.op_type == "Gather"]
    named = [table for table in tables if table and _POSITIONS.search(str(table.name))]
    return min((rows for table in named for rows in _rows(table)), default=None)


def _rows(table: ir.Value | None) -> Iterator[int]:
    """Of an initializer, the first of its dimensions."""
    if table is not None and table.is_initializer() and table.shape:
        yield int(table.shape[0])  # type: ignore[arg-type]


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)
