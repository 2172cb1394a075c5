"""Reading and writing protobuf by hand, for the few messages that are needed before protobuf can be afforded.

Importing the protobuf runtime costs several times an interpreter start; `start`, `delete` and `-info` exchange
one small message each. Encoding: protobuf.dev "Encoding", wire types 0 (varint), 1 (64 bit), 2 (length), 5 (32 bit).
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

Value = int | bytes


def fields(data: bytes) -> "Iterator[tuple[int, Value]]":
    """Yield (field number, value) in wire order: int for varints and fixed widths, bytes for lengths.

    Raises:
        ValueError: the bytes are not a protobuf message.
    """
    pos, end = 0, len(data)
    while pos < end:
        tag, pos = _varint(data, pos)
        number, wire_type = tag >> 3, tag & 7
        value: Value
        if number == 0:
            raise ValueError("field number 0")
        if wire_type == 0:
            value, pos = _varint(data, pos)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
            value, pos = int.from_bytes(data[pos : pos + size], "little"), pos + size
        elif wire_type == 2:
            size, pos = _varint(data, pos)
            value, pos = data[pos : pos + size], pos + size
        else:
            raise ValueError(f"wire type {wire_type}")
        if pos > end:
            raise ValueError("truncated message")
        yield number, value


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if pos >= len(data) or shift > 63:
            raise ValueError("truncated or overlong varint")
        byte = data[pos]
        pos += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, pos
        shift += 7


def text(value: Value) -> str:
    """A length-delimited field as text.

    Raises:
        ValueError: not length-delimited, or not UTF-8.
    """
    if isinstance(value, int):
        raise ValueError("want a string, got a number")
    return value.decode()


def varint(value: int) -> bytes:
    """Encode a non-negative integer."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def int_field(number: int, value: int) -> bytes:
    """A varint field; empty for 0, which proto3 does not write."""
    return varint(number << 3) + varint(value) if value else b""


def bytes_field(number: int, value: bytes | str) -> bytes:
    """A length-delimited field; empty for no bytes."""
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data if data else b""
