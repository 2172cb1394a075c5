"""The other end of a connection, written from the protocol's description and sharing no code with the package.

Frames and envelope bodies are put together byte by byte here. Messages are google.protobuf.StringValue, whose
wire form is `0a LENGTH TEXT`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.wrappers_pb2 import StringValue

from ttrpc import Method, Service

if TYPE_CHECKING:
    import socket

ECHO = Service(
    "t.Echo",
    (
        Method("Unary", StringValue, StringValue),
        Method("Up", StringValue, StringValue, client_streaming=True),
        Method("Down", StringValue, StringValue, server_streaming=True),
        Method("Both", StringValue, StringValue, client_streaming=True, server_streaming=True),
        Method("Missing", StringValue, StringValue),
    ),
)

REQUEST, RESPONSE, DATA = 1, 2, 3
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 1, 2, 4
LIMIT = 4194304


class Frame(NamedTuple):
    stream_id: int
    kind: int
    flags: int
    data: bytes


def frame(stream_id: int, kind: int, flags: int, data: bytes, length: int | None = None) -> bytes:
    size = len(data) if length is None else length
    return size.to_bytes(4, "big") + stream_id.to_bytes(4, "big") + bytes([kind, flags]) + data


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, data: bytes) -> bytes:
    """A length-delimited field. An empty one is not written, as in proto3."""
    return bytes([number << 3 | 2]) + varint(len(data)) + data if data else b""


def text(value: str) -> bytes:
    return field(1, value.encode())


def request_body(
    method: str,
    payload: bytes = b"",
    *,
    service: str = "t.Echo",
    timeout_nano: int = 0,
    metadata: tuple[tuple[str, str], ...] = (),
) -> bytes:
    pairs = b"".join(field(5, field(1, key.encode()) + field(2, value.encode())) for key, value in metadata)
    timeout = b"\x20" + varint(timeout_nano) if timeout_nano else b""
    return field(1, service.encode()) + field(2, method.encode()) + field(3, payload) + timeout + pairs


def request(
    stream_id: int, method: str, payload: bytes = b"", *, flags: int = 0, timeout_nano: int = 0
) -> bytes:
    return frame(stream_id, REQUEST, flags, request_body(method, payload, timeout_nano=timeout_nano))


def response(stream_id: int, payload: bytes = b"") -> bytes:
    return frame(stream_id, RESPONSE, 0, field(2, payload))


def status_body(code: int, message: str) -> bytes:
    return field(1, b"\x08" + bytes([code]) + field(2, message.encode()))


def failure(stream_id: int, code: int, message: str) -> Frame:
    return Frame(stream_id, RESPONSE, 0, status_body(code, message))


class Peer:
    """Reads and writes raw frames."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, *chunks: bytes) -> None:
        await self._loop.sock_sendall(self.sock, b"".join(chunks))

    async def exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            chunk = await self._loop.sock_recv(self.sock, count - len(data))
            if not chunk:
                raise EOFError(bytes(data))
            data += chunk
        return bytes(data)

    async def frame(self) -> Frame:
        header = await self.exactly(10)
        length = int.from_bytes(header[:4], "big")
        return Frame(int.from_bytes(header[4:8], "big"), header[8], header[9], await self.exactly(length))

    async def frames(self, count: int) -> list[Frame]:
        return [await self.frame() for _ in range(count)]

    async def at_end(self) -> bool:
        """Wait for the other side to close without sending anything more."""
        try:
            return await self._loop.sock_recv(self.sock, 1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()
