"""How many tokens, positions and kinds of tokens a graph's own tables have."""

import numpy as np
import onnx_ir as ir
import pytest

from loraexport.graphs.tables import table_rows, with_tables
from loraexport_runtime.contract.kinds import Facts

CONFIG = Facts(None, None, None, {}, None, {}, None, None, 4, None)
"""That of a config.json which says positions alone."""


def table(name: str, rows: int) -> ir.Value:
    values = ir.tensor(np.zeros((rows, 2), np.float32), name=name)
    return ir.Value(name=name, shape=ir.Shape([rows, 2]), const_value=values)


def make_graph(
    counts: str, table_name: str = "bert.embeddings.position_embeddings.weight"
) -> ir.Graph:
    """ids through a Cast into a table of 9 words; positions as `counts` says."""
    kind = ir.TensorType(ir.DataType.INT64)
    ids, places, types = (
        ir.Value(name=name, shape=ir.Shape(["batch", "n"]), type=kind)
        for name in ("input_ids", "position_ids", "token_type_ids")
    )
    words, positions, sorts = table("words", 9), table(table_name, 5), table("sorts", 2)
    cast = ir.node("Cast", [ids], {"to": ir.DataType.INT64})
    nodes = [cast, ir.node("Gather", [words, cast.outputs[0]]), ir.node("Gather", [sorts, types])]
    source = {"input": places, "table": cast.outputs[0], "sum": cast.outputs[0]}[counts]
    if counts == "sum":
        nodes.append(ir.node("CumSum", [source]))
        source = nodes[-1].outputs[0]
    if counts == "table":  # as a slice of a constant: of nothing that the ids say
        nodes.append(ir.node("Shape", [source]))
        source = nodes[-1].outputs[0]
    nodes.append(ir.node("Gather", [positions, source]))
    inputs = [ids, types, *([places] if counts == "input" else [])]
    return ir.Graph(inputs, [], nodes=nodes, initializers=[words, positions, sorts])


@pytest.mark.parametrize(
    ("counts", "positions"),
    [
        ("input", 5),  # whatever the config says: rows of the table that position_ids look up
        ("table", 4),  # the config's, which is less
        ("sum", 4),  # as RoBERTa counts: of the table's rows some are of no token
    ],
)
def test_tables_beside_a_config(counts: str, positions: int) -> None:
    facts = with_tables(CONFIG, make_graph(counts))
    assert (facts.vocab_size, facts.positions, facts.type_vocab_size) == (9, positions, 2)


def test_tables_where_no_config_tells() -> None:
    nothing = Facts(None, None, None, {}, None, {}, None, None, None, None)
    assert with_tables(nothing, make_graph("table")).positions == 5
    assert with_tables(nothing, make_graph("table", "transformer.wpe.weight")).positions == 5
    assert with_tables(nothing, make_graph("sum")).positions is None
    assert (
        with_tables(nothing, make_graph("table", "x_position_embeddings_of_boxes")).positions
        is None
    )
    assert with_tables(nothing, ir.Graph([], [], nodes=[])) == nothing


def test_a_vocabulary_that_is_smaller_than_its_table() -> None:
    """Of a table that was filled up to a round number."""
    small = Facts(None, 7, None, {}, None, {}, None, None, None, None)
    assert with_tables(small, make_graph("table")).vocab_size == 7
    assert table_rows(make_graph("table"), "input_ids") == 9
    assert table_rows(make_graph("table"), "position_ids") is None
