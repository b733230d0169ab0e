"""The graphs by which the runtime generates, written beside a decoder's own.

The step's is the decoder's, of the same weights, with logits after chosen tokens alone, and nodes
behind them that give what the next step takes; two small ones bring the logits of rows, and the
highest of them, to the host.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from loraexport_runtime.contract.genai_config import read_genai_config
from loraexport_runtime.contract.kinds import ADAPTER_WEIGHTS, GOES_ON, LENGTHS, PLACES, ROWS
from loraexport_runtime.generation.steps.files import StepFiles
from loraexport_runtime.generation.steps.next_inputs import NO_TOKEN, next_inputs

from ..errors import BaseModelError
from ..graphs.output_layer import OutputLayer, find_output_layer
from .graft import ADAPTER_IDS

_OPSET, _IR_VERSION = 17, 8
"""Of the small graphs."""
_LENGTH, _TOLD = "loraexport/length", "loraexport/told"


def write_steps(folder: Path) -> StepFiles:
    """Write the graphs of a folder with a genai_config.json, whose graph is there."""
    decoder = read_genai_config(folder, BaseModelError)["model"]["decoder"]
    file = folder / decoder["filename"]
    files = StepFiles.of(folder)
    model = ir.load(file)  # its weights stay in the file beside it
    dtype = _logits(model.graph).dtype
    assert dtype is not None, "a graph's output has a type"
    add_tail(model.graph, decoder["inputs"].values())
    ir.save(model, files.step)
    ir.save(top_tokens_model(dtype), files.top_tokens)
    ir.save(row_logits_model(dtype), files.row_logits)
    return files


def add_tail(graph: ir.Graph, input_names: Collection[str]) -> None:
    """Put the nodes ahead of a decoder's output layer, and behind its logits.

    x' [rows, told, hidden] = Gather(Flatten(x [batch, n, hidden]), ROWS), so that the output layer,
    a large part of a small model, computes what is asked of it and not every token of a prompt;
    tokens [rows, 1] = ArgMax(logits[:, -1]), or -1 where one of these is NaN;
    lengths = LENGTHS + GOES_ON; mask [rows, length] = PLACES < lengths;
    positions [rows, 1] = lengths - 1.

    Each output may lie where the input lies that it is for: all depend on the tokens, and these on
    the logits, so that none is written before the graph has read its inputs.

    Args:
        input_names: what the graph takes.
    """
    outputs = next_inputs(input_names)
    rows = _value(ROWS, ir.DataType.INT64, [ROWS, _TOLD])
    lengths = _value(LENGTHS, ir.DataType.INT64, [ROWS, 1])
    goes_on = _value(GOES_ON, ir.DataType.INT64, [ROWS, 1])
    places = _value(PLACES, ir.DataType.INT64, [1, _LENGTH])
    _choose_tokens(graph, find_output_layer(graph, (ADAPTER_IDS, ADAPTER_WEIGHTS)), rows)
    nodes = _Nodes("loraexport/")
    end = nodes.add("Constant", [], "end", value_int=-1)
    last = nodes.add("Gather", [_logits(graph), end], "last", axis=1)
    wide = nodes.add("Cast", [last], "wide", to=ir.DataType.FLOAT)
    likeliest = nodes.add("ArgMax", [wide], "likeliest", axis=1)
    axis = nodes.add("Constant", [], "axis", value_ints=[1])
    total = nodes.add("ReduceSum", [wide, axis], "total")
    is_number = nodes.add("Equal", [total, total], "is_number")  # NaN is not equal to itself
    no_token = nodes.add("Constant", [], "no_token", value_int=NO_TOKEN)
    chosen = nodes.add("Where", [is_number, likeliest, no_token], outputs["input_ids"])
    given = {"input_ids": chosen}
    zero = nodes.add("Constant", [], "zero", value_int=0)
    # 0, but not before the tokens are there
    nothing = nodes.add("Mul", [given["input_ids"], zero], "nothing")
    more = nodes.add("Add", [nothing, goes_on], "more")
    # What follows takes the new lengths, as the old ones may be overwritten by now.
    given[LENGTHS] = nodes.add("Add", [lengths, more], outputs[LENGTHS])
    if "attention_mask" in outputs:
        is_read = nodes.add("Less", [places, given[LENGTHS]], "is_read")
        mask = nodes.add("Cast", [is_read], outputs["attention_mask"], to=ir.DataType.INT64)
        given["attention_mask"] = mask
    if "position_ids" in outputs:
        one = nodes.add("Constant", [], "one", value_int=1)
        given["position_ids"] = nodes.add("Sub", [given[LENGTHS], one], outputs["position_ids"])
    for name, value in given.items():
        value.type = ir.TensorType(ir.DataType.INT64)
        value.shape = ir.Shape([ROWS, _LENGTH if name == "attention_mask" else 1])
    graph.inputs.extend([rows, lengths, goes_on, places])
    graph.extend(nodes.nodes)
    graph.outputs.extend(given[name] for name in outputs)


def _choose_tokens(graph: ir.Graph, layer: OutputLayer, rows: ir.Value) -> None:
    """Let an output layer see the tokens `rows` alone; where none was found, cut its logits."""
    x, logits = layer.x, _logits(graph)
    maker = x.producer()
    assert maker is not None, "the graph computes it"
    nodes = _Nodes("loraexport/")
    flat = nodes.add("Flatten", [x], "flat", axis=2)
    chosen = nodes.add("Gather", [flat, rows], "chosen")
    chosen.type = x.type
    graph.insert_after(maker, nodes.nodes)
    assert logits.shape is not None, "a graph's output has a shape"
    shape = ir.Shape([ROWS, _TOLD, logits.shape[2]])
    for node in layer.nodes:
        for index, value in enumerate(node.inputs):
            if value is x:
                node.replace_input_with(index, chosen)
        for value in node.outputs:
            value.shape = None  # it was that of every token
    (chosen if x is logits else logits).shape = shape
    if x is logits:
        x.name, chosen.name = "loraexport/every_logits", x.name
        graph.outputs[list(graph.outputs).index(x)] = chosen


def row_logits_model(dtype: ir.DataType) -> ir.Model:
    """wide [m, vocabulary] = Cast(Gather(Flatten(logits), rows))."""
    nodes, logits, rows = _Nodes(""), _logits_input(dtype), _value("rows", ir.DataType.INT64, ["m"])
    wide = _wide_rows(nodes, logits, rows)
    wide.shape, wide.type = ir.Shape(["m", "vocabulary"]), ir.TensorType(ir.DataType.FLOAT)
    return _model("row_logits", [logits, rows], [wide], nodes)


def top_tokens_model(dtype: ir.DataType) -> ir.Model:
    """The parts: x [m * parts, width] = Cast(Gather(Flatten(logits), rows)); their highest `own` of
    x, of which the token is `first` of the part and the place in it; of all of a row the highest
    `count`.

    CUDA's TopK gives each row one block, so rows are cut into parts, and the highest of their
    highest are the row's.
    """
    nodes, logits = _Nodes(""), _logits_input(dtype)
    shapes: dict[str, Sequence[str | int]] = {
        "rows": ["m"],
        "cut": [2],
        "own": [1],
        "first": ["m_parts", 1],
        "joined": [2],
        "count": [1],
    }
    given = {name: _value(name, ir.DataType.INT64, shape) for name, shape in shapes.items()}
    wide = _wide_rows(nodes, logits, given["rows"])
    parts = nodes.add("Reshape", [wide, given["cut"]], "parts")
    part_values, places = nodes.add_two("TopK", [parts, given["own"]], ("part_values", "places"))
    part_tokens = nodes.add("Add", [places, given["first"]], "part_tokens")
    row_values = nodes.add("Reshape", [part_values, given["joined"]], "row_values")
    row_tokens = nodes.add("Reshape", [part_tokens, given["joined"]], "row_tokens")
    values, chosen = nodes.add_two("TopK", [row_values, given["count"]], ("values", "chosen"))
    tokens = nodes.add("GatherElements", [row_tokens, chosen], "tokens", axis=1)
    for value, kind in ((values, ir.DataType.FLOAT), (tokens, ir.DataType.INT64)):
        value.shape, value.type = ir.Shape(["m", "k"]), ir.TensorType(kind)
    return _model("top_tokens", [logits, *given.values()], [values, tokens], nodes)


class _Nodes:
    """Nodes of the standard operators, one after the other, named after their outputs."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self._prefix = prefix

    def add(
        self, kind: str, inputs: Sequence[ir.Value], output: str, **attributes: Any
    ) -> ir.Value:
        """One of one output."""
        name = output if output.startswith(self._prefix) else f"{self._prefix}{output}"
        values = [ir.Value(name=name)]
        self.nodes.append(ir.node(kind, inputs, attributes, outputs=values, name=name))
        return values[0]

    def add_two(
        self, kind: str, inputs: Sequence[ir.Value], outputs: tuple[str, str]
    ) -> tuple[ir.Value, ir.Value]:
        """One of two outputs."""
        first, second = (ir.Value(name=name) for name in outputs)
        self.nodes.append(ir.node(kind, inputs, outputs=[first, second], name=outputs[0]))
        return first, second


def _wide_rows(nodes: _Nodes, logits: ir.Value, rows: ir.Value) -> ir.Value:
    flat = nodes.add("Flatten", [logits], "flat", axis=2)
    taken = nodes.add("Gather", [flat, rows], "taken")
    return nodes.add("Cast", [taken], "wide", to=ir.DataType.FLOAT)


def _logits(graph: ir.Graph) -> ir.Value:
    return next(value for value in graph.outputs if value.name == "logits")


def _logits_input(dtype: ir.DataType) -> ir.Value:
    return _value("logits", dtype, ["batch", "n", "vocabulary"])


def _value(name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _model(
    name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: _Nodes
) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes.nodes, opset_imports={"": _OPSET}, name=name)
    return ir.Model(graph, ir_version=_IR_VERSION)
