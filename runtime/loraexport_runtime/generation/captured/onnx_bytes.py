"""Messages of onnx.proto, written by hand: the runtime has no onnx. The numbers are the fields'."""

from collections.abc import Sequence

from ...device.dtypes import ONNX_TYPES


def graph(nodes: Sequence[bytes], inputs: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    """A GraphProto without a name."""
    made = b"".join(field(1, one) for one in nodes)
    made += b"".join(field(11, one) for one in inputs)
    return made + b"".join(field(12, output) for output in outputs)


def node(kind: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: int) -> bytes:
    """A NodeProto."""
    made = b"".join(field(1, name) for name in inputs)
    made += b"".join(field(2, name) for name in outputs)
    made += field(4, kind)
    for name, number in attributes.items():
        made += field(5, field(1, name) + field(3, number) + field(20, 2))  # of type INT
    return made


def value(name: str, dtype: str, shape: Sequence[str | int]) -> bytes:
    """A ValueInfoProto of a tensor."""
    sizes = (field(1 if isinstance(size, int) else 2, size) for size in shape)
    dimensions = b"".join(field(1, size) for size in sizes)
    tensor = field(1, ONNX_TYPES[dtype]) + field(2, dimensions)
    return field(1, name) + field(2, field(1, tensor))


def field(number: int, value: bytes | str | int) -> bytes:
    """A field of a message: a varint, or bytes with their length ahead."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last have the eighth bit set."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
