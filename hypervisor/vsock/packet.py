"""The packet header of virtio-vsock (virtio 1.2, section 5.10.6) and its numbers.

Pure layout, no I/O. A packet is this 44-byte little-endian header followed by `length` bytes, of which only
OP_RW has any, and lies in a chain of buffers, in pieces as the driver likes. Field order of `HEADER`:

    src_cid, dst_cid, src_port, dst_port, length, type, op, flags, buf_alloc, fwd_cnt
"""

from __future__ import annotations

import struct
from typing import Final

HEADER: Final = struct.Struct("<QQIIIHHIII")
HEADER_BYTES: Final = HEADER.size

HOST_CID: Final = 2
"""The host's well-known context id."""
FIRST_GUEST_CID: Final = 3
"""0 is reserved, 1 is loopback, 2 is the host."""
LAST_GUEST_CID: Final = 0xFFFF_FFFE
"""Context ids travel in 64 bits of which the upper 32 are zero; all ones means "any"."""

TYPE_STREAM: Final = 1

OP_REQUEST: Final = 1
OP_RESPONSE: Final = 2
OP_RST: Final = 3
OP_SHUTDOWN: Final = 4
OP_RW: Final = 5
OP_CREDIT_UPDATE: Final = 6
OP_CREDIT_REQUEST: Final = 7

SHUTDOWN_RCV: Final = 1
"""Flag of OP_SHUTDOWN: the sender will receive no more."""
SHUTDOWN_SEND: Final = 2
"""Flag of OP_SHUTDOWN: the sender will send no more."""
SHUTDOWN_BOTH: Final = SHUTDOWN_RCV | SHUTDOWN_SEND

COUNTER_MASK: Final = 0xFFFF_FFFF
"""buf_alloc, fwd_cnt and the byte counters behind them wrap at 32 bits."""


def read_header(buffers: list[memoryview]) -> tuple[int, ...]:
    """The header's fields; `buffers` have at least `HEADER_BYTES` in total."""
    if len(buffers[0]) >= HEADER_BYTES:
        return HEADER.unpack_from(buffers[0])
    return HEADER.unpack(b"".join(window(buffers, 0, HEADER_BYTES)))


def write_header(buffers: list[memoryview], fields: tuple[int, ...]) -> None:
    """Put a header in front of `buffers`, which have at least `HEADER_BYTES` in total."""
    if len(buffers[0]) >= HEADER_BYTES:
        HEADER.pack_into(buffers[0], 0, *fields)
        return
    header = HEADER.pack(*fields)
    done = 0
    for view in window(buffers, 0, HEADER_BYTES):
        view[:] = header[done : done + len(view)]
        done += len(view)


def window(buffers: list[memoryview], start: int, count: int) -> list[memoryview]:
    """Views of the `count` bytes from `start` on; fewer when `buffers` end before."""
    views: list[memoryview] = []
    for view in buffers:
        size = len(view)
        if start >= size:
            start -= size
            continue
        if not count:
            break
        piece = view[start : start + count] if start or count < size else view
        start = 0
        count -= len(piece)
        views.append(piece)
    return views
