"""The header of a safetensors file -> name, dtype, shape and place of every tensor, checked.

A file: eight bytes with the header's length, the header in JSON, the tensors' bytes end to end.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..contract.json_values import strict_json
from ..errors import quoted

MAX_HEADER = 64 * 2**20
"""Bytes: several times the header of the largest checkpoints; the format allows 100 MB."""
MAX_TENSORS = 200_000
"""The largest checkpoints, with their experts apart, have some 90,000."""
MAX_NAME = 500
"""Characters of a tensor's name: twice the longest that PEFT writes."""
MAX_DIMENSIONS = 8
_BITS = {
    **{"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16},
    **{"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64},
    **{"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8},
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


class HeaderError(ValueError):
    """What is wrong with a header; whoever reads the file says where."""


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says about one tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """A safetensors dtype name: `F32`, `F16`, `BF16`, `I64`, …"""
    start: int
    """Of its bytes in the file."""
    size: int
    """In bytes."""


def parse_header(file: BinaryIO, size: int, path: Path) -> dict[str, TensorInfo]:
    """Read a file's header, from its start.

    Args:
        size: of the whole file.

    Raises:
        HeaderError: the file is not whole, or no safetensors file.
    """
    length = int.from_bytes(_read(file, 8), "little")
    if length > min(MAX_HEADER, size - 8):
        raise HeaderError(f"its header of {length:,} bytes is longer than the file or the format")
    header = _parse(_read(file, length))
    header.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _info(name, entry, start, path) for name, entry in header.items()}
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if info.start != end:
            raise HeaderError(f"tensor {name!r} does not begin where the one before it ends")
        end += info.size
    if end != size:
        raise HeaderError(f"the tensors end at byte {end:,}, but the file at {size:,}")
    return tensors


def _read(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise HeaderError("it ends in its header")
    return data


def _parse(text: bytes) -> dict[str, Any]:
    """The header as an object, once it is known to have no more than so many values."""
    if text.count(b"{") > MAX_TENSORS + 2 or text.count(b",") > 12 * MAX_TENSORS:
        raise HeaderError(f"it has more than {MAX_TENSORS:,} tensors")
    try:
        header = strict_json(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise HeaderError(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise HeaderError("its header is no JSON object")
    return header


def _info(name: str, entry: Any, start: int, path: Path) -> TensorInfo:
    where = f"tensor {quoted(name)}"
    if len(name) > MAX_NAME or not name.isprintable():
        raise HeaderError(f"{where}: a name of at most {MAX_NAME} printable characters is expected")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{where}: dtype, shape and data_offsets are expected")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise HeaderError(f"{where}: its dtype {quoted(dtype)} is unknown")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"{where}: {quoted(shape)} is no shape")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{where}: {quoted(offsets)} are no data_offsets")
    size = offsets[1] - offsets[0]
    if math.prod(shape) * bits != size * 8:
        raise HeaderError(f"{where}: {dtype} {quoted(shape)} does not have {size:,} bytes")
    return TensorInfo(path, tuple(shape), dtype, start + offsets[0], size)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(size) is int and 0 <= size < 2**63 for size in value
    )
