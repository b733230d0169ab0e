"""Nodes behind a decoder's logits: the likeliest tokens, and what else the next step takes.

A message of protobuf behind another one of its kind reads as the two merged: so the bytes of a
model and then these are the model with a tail.
"""

from collections.abc import Collection

from ...device.dtypes import ONNX_TYPES
from .onnx_bytes import field, graph, node, value

ROWS = "loraexport/rows"
"""An input of the tail, int64 [rows]: each row's last token among the batch * n of the logits."""
LENGTHS = "loraexport/lengths"
"""An input of the tail, int64 [rows, 1]: the tokens of each row, with those that are read now."""
PLACES = "loraexport/places"
"""An input of the tail, int64 [1, length]: 0, 1, … length - 1."""
_LENGTH = "loraexport/length"


def next_inputs(taken: Collection[str]) -> dict[str, str]:
    """Input of a step -> the tail's output for the next one; `taken`: what the graph takes."""
    masks = [name for name in ("attention_mask", "position_ids") if name in taken]
    return {name: f"loraexport/next/{name}" for name in ("input_ids", LENGTHS, *masks)}


def write_tail(taken: Collection[str]) -> bytes:
    """The end of an onnx.ModelProto.

    tokens [rows, 1] = ArgMax(Gather(Flatten(logits), ROWS)); lengths = LENGTHS + 1;
    mask [rows, length] = PLACES < lengths; positions [rows, 1] = lengths - 1.

    Each output may lie where the input lies that it is for: all depend on the tokens, and these on
    the logits, so that none is written before the graph has read its inputs.

    Args:
        taken: what the graph takes.
    """
    outputs = next_inputs(taken)
    tokens, lengths = outputs["input_ids"], outputs[LENGTHS]
    names = ("zero", "one", "flat", "last", "wide", "nothing", "more", "is_read")
    zero, one, flat, last, wide, nothing, more, is_read = (f"loraexport/{name}" for name in names)
    nodes = [
        node("Constant", [], [zero], value_int=0),
        node("Constant", [], [one], value_int=1),
        node("Flatten", ["logits"], [flat], axis=2),
        node("Gather", [flat, ROWS], [last]),
        node("Cast", [last], [wide], to=ONNX_TYPES["float32"]),
        node("ArgMax", [wide], [tokens], axis=1),
        node("Mul", [tokens, zero], [nothing]),  # 0, but not before the tokens are there
        node("Add", [nothing, one], [more]),
        node("Add", [LENGTHS, more], [lengths]),
    ]
    # These take the new lengths, as the old ones may be overwritten by now.
    if "attention_mask" in outputs:
        nodes.append(node("Less", [PLACES, lengths], [is_read]))
        mask = outputs["attention_mask"]
        nodes.append(node("Cast", [is_read], [mask], to=ONNX_TYPES["int64"]))
    if "position_ids" in outputs:
        nodes.append(node("Sub", [lengths, one], [outputs["position_ids"]]))
    inputs = [
        value(ROWS, "int64", [ROWS]),
        value(LENGTHS, "int64", [ROWS, 1]),
        value(PLACES, "int64", [1, _LENGTH]),
    ]
    made = [
        value(output, "int64", [ROWS, _LENGTH if name == "attention_mask" else 1])
        for name, output in outputs.items()
    ]
    return field(7, graph(nodes, inputs, made))
