"""Netlink messages and attributes as bytes (netlink(7), rtnetlink(7)); no input or output.

Everything is in the machine's own byte order and aligned to four bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

# Message types and flags, <linux/netlink.h>.
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE, NLM_F_APPEND = 0x100, 0x200, 0x400, 0x800
NLM_F_DUMP = 0x300
NLM_F_DUMP_INTR = 0x10
# An attribute's type has flags in its two highest bits.
_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_ERROR = struct.Struct("=i")


class Message(NamedTuple):
    """One message: its type (`RTM_...`, `NLMSG_...`), flags, sequence number, and what follows the header."""

    kind: int
    flags: int
    sequence: int
    body: bytes


class BrokenMessage(ValueError):
    """Bytes that are no netlink message."""


def pack(kind: int, flags: int, sequence: int, body: bytes) -> bytes:
    """One message."""
    return _HEADER.pack(_HEADER.size + len(body), kind, flags, sequence, 0) + body


def unpack(data: bytes) -> Iterator[Message]:
    """The messages of one datagram. Raises BrokenMessage."""
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise BrokenMessage(f"{len(data) - at} bytes are less than a header")
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= len(data) - at:
            raise BrokenMessage(f"a message of {length} bytes in {len(data) - at}")
        yield Message(kind, flags, sequence, data[at + _HEADER.size : at + length])
        at += _aligned(length)


def error_of(message: Message) -> int:
    """The error number that an NLMSG_ERROR or NLMSG_DONE carries, 0 for success. Raises BrokenMessage."""
    if len(message.body) < _ERROR.size:
        if message.kind == NLMSG_DONE:
            return 0
        raise BrokenMessage("an error without a number")
    return -int(_ERROR.unpack_from(message.body)[0])


def attribute(kind: int, value: bytes | int | str) -> bytes:
    """One attribute: bytes as they are, numbers as 32 bits, text with a zero byte."""
    if isinstance(value, int):
        value = struct.pack("=I", value)
    elif isinstance(value, str):
        value = value.encode() + b"\0"
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes of a message by their type; of several with one type, the last. Raises BrokenMessage."""
    found = {}
    at = 0
    while len(data) - at >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise BrokenMessage(f"an attribute of {length} bytes in {len(data) - at}")
        found[kind & _TYPE_MASK] = data[at + _ATTRIBUTE.size : at + length]
        at += _aligned(length)
    return found


def number(data: bytes | None, default: int = 0) -> int:
    """A number of 1, 2, 4 or 8 bytes; the default when there is none."""
    if data is None:
        return default
    if len(data) not in (1, 2, 4, 8):
        raise BrokenMessage(f"a number of {len(data)} bytes")
    return int(struct.unpack({1: "=B", 2: "=H", 4: "=I", 8: "=Q"}[len(data)], data)[0])


def text(data: bytes | None) -> str:
    """Text up to its zero byte; names of interfaces are any bytes."""
    return "" if data is None else data.split(b"\0", 1)[0].decode(errors="surrogateescape")


def _aligned(length: int) -> int:
    return (length + 3) & ~3
