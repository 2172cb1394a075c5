"""Connections that go through host and guest: each side joins its socket to a stream of vsock, by the same rules."""

from __future__ import annotations

import asyncio
import socket

SOCKETS_PORT = 1031
"""The guest's vsock port for connections that the host takes over; the first bytes are the token."""

TOKEN_BYTES = 16

_CHUNK_BYTES = 65536
"""What is on its way in one direction of one connection, beside the buffers of the sockets."""


async def relay(one: socket.socket, other: socket.socket) -> None:
    """Carry the bytes of two non-blocking sockets to each other until both have ended. The end of one direction is
    passed on by itself. Raises OSError when a connection breaks; closing both is the caller's part."""
    ways = [asyncio.ensure_future(_carry(one, other)), asyncio.ensure_future(_carry(other, one))]
    try:
        await asyncio.gather(*ways)
    finally:
        for way in ways:
            way.cancel()


async def _carry(source: socket.socket, target: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK_BYTES):
        await loop.sock_sendall(target, data)
    target.shutdown(socket.SHUT_WR)
