"""An ONNX file -> what it takes, gives and holds, and which other files it reads.

Of the protobuf only what is needed is parsed: the runtime has no onnx, and no weight is read.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import LoraexportError
from .foreign import open_file, reason

TENSOR_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}
"""onnx.TensorProto.DataType, spelled out so that the runtime needs no onnx."""
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {},
}
"""Message -> its fields that lead to a tensor, and the message in each; as in onnx.proto."""
_FIXED = {1: 8, 5: 4}
"""Wire type -> bytes."""
MAX_MESSAGES = 2_000_000
"""Nodes, attributes, tensors and the like: the graphs of large models have some 100,000."""


@dataclass(frozen=True)
class TensorType:
    """The dtype, as of TENSOR_TYPES, and the shape of a value; None: not known ahead."""

    dtype: int
    shape: tuple[int | None, ...] | None


@dataclass(frozen=True)
class External:
    """Where an initializer's bytes lie: in a file beside the graph's."""

    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class OnnxFile:
    """The values of the file's graph by name, and the files beside it that it reads."""

    inputs: dict[str, TensorType]
    """Initializers that can be overridden are among them."""
    outputs: dict[str, TensorType]
    initializers: dict[str, TensorType]
    locations: frozenset[str]
    """As written, wherever in the file."""
    external: dict[str, External] = field(default_factory=dict)
    """Of those initializers that lie in files beside this one."""
    functions: frozenset[tuple[str, str]] = frozenset()
    """Domain and name of each."""


def read_onnx(file: Path, error: type[LoraexportError], hint: str = "") -> OnnxFile:
    """Raise `error` unless it is a regular file that can be read as ONNX.

    Args:
        hint: what to do if there is no such file.
    """
    try:
        with open_file(file, error, hint) as opened:
            # Not closed by itself: it goes with the last view of it, which an error may keep.
            data = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
        return _read_model(memoryview(data))
    except OSError as cause:
        raise error(f"{file}: {reason(cause)}") from cause
    except (ValueError, IndexError) as cause:  # an empty file cannot be mapped
        raise error(f"{file}: not readable as ONNX: {cause}; copy or download it again") from cause


def _read_model(view: memoryview) -> OnnxFile:
    values: dict[int, dict[str, TensorType]] = {5: {}, 11: {}, 12: {}}
    locations, functions = set(), set()
    external = {}
    for number, graph in _messages(view):
        if number == 25:
            texts = {place: text for place, text in _messages(graph) if place in (1, 10)}
            functions.add((str(texts.get(10, b""), "utf-8"), str(texts.get(1, b""), "utf-8")))
        for place, message in _messages(graph) if number == 7 else ():
            if place in values:
                name, kind = _tensor(message) if place == 5 else _value(message)
                values[place][name] = kind
                if place == 5 and (found := _external(message)) is not None:
                    external[name] = found
    waiting, num_messages = [("model", view)], 0
    while waiting:
        kind_name, content = waiting.pop()
        if kind_name == "entry":
            pair = {number: str(text, "utf-8") for number, text in _messages(content)}
            locations |= {pair.get(2, "")} if pair.get(1) == "location" else set()
            continue
        children = _CHILDREN[kind_name]
        for number, part in _messages(content):
            num_messages += 1
            if num_messages > MAX_MESSAGES:
                raise ValueError(f"more than {MAX_MESSAGES:,} nodes, attributes and tensors")
            if number in children:
                waiting.append((children[number], part))
    where = frozenset(locations)
    return OnnxFile(values[11], values[12], values[5], where, external, frozenset(functions))


def _tensor(view: memoryview) -> tuple[str, TensorType]:
    """A TensorProto's name, dtype and dims."""
    name, dtype, dims = "", 0, []
    for number, value in _fields(view):
        if number == 1:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif number == 2 and isinstance(value, int):
            dtype = value
        elif number == 8 and not isinstance(value, int):
            name = str(value, "utf-8")
    return name, TensorType(dtype, tuple(dims))


def _external(view: memoryview) -> External | None:
    """Of a TensorProto whose bytes lie elsewhere."""
    entries = {}
    for number, message in _messages(view):
        if number == 13:
            pair = {part: str(text, "utf-8") for part, text in _messages(message)}
            entries[pair.get(1)] = pair.get(2, "")
    if "location" not in entries:
        return None
    return External(
        entries["location"], int(entries.get("offset", "0")), int(entries.get("length", "0"))
    )


def _value(view: memoryview) -> tuple[str, TensorType]:
    """A ValueInfoProto's name, and the dtype and shape of the tensor that it is."""
    parts = dict(_messages(view))
    tensor = dict(_messages(parts.get(2, view[:0]))).get(1, view[:0])
    dtype, shape = 0, None
    for number, value in _fields(tensor):
        if number == 1 and isinstance(value, int):
            dtype = value
        elif number == 2 and not isinstance(value, int):
            sizes = [dict(_fields(dim)).get(1) for _, dim in _messages(value)]
            shape = tuple(size if isinstance(size, int) else None for size in sizes)
    return str(parts.get(1, view[:0]), "utf-8"), TensorType(dtype, shape)


def _messages(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that are messages, texts or bytes."""
    for number, value in _fields(view):
        if not isinstance(value, int):
            yield number, value


def _fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of a message. Raises ValueError, IndexError: it is none."""
    at = 0
    while at < len(view):
        key, at = _varint(view, at)
        wire = key & 7
        if wire == 0:
            number, at = _varint(view, at)
            yield key >> 3, number
            continue
        size, at = _varint(view, at) if wire == 2 else (_FIXED.get(wire, 0), at)
        if wire not in (1, 2, 5) or size > len(view) - at:
            raise ValueError(f"a field of wire type {wire} and {size} bytes")
        yield key >> 3, view[at : at + size]
        at += size


def _varints(view: memoryview) -> Iterator[int]:
    at = 0
    while at < len(view):
        value, at = _varint(view, at)
        yield value


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number of up to ten bytes of seven bits, and where the next field begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than ten bytes")
