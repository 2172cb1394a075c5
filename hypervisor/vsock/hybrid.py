"""A Unix socket through which programs of this host reach the guest's vsock ports ("hybrid vsock").

A client connects, writes `CONNECT <port>` and a newline, and reads `OK <host port>` and a newline; from
then on its connection is the stream. When the guest has no listener, or the line is not understood, the
connection closes. Firecracker made the protocol, Kata's tools speak it in lower case.

The client's own socket becomes the host's end of the stream, so it costs nothing once connected.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MAX_LINE_BYTES = 32
_MAX_PORT = 0xFFFF_FFFE
_MAX_HANDSHAKES = 64
_LINE_LIMIT_S = 10.0


class Attachable(Protocol):
    """The one thing needed of `UserVsock`."""

    async def attach(
        self, port: int, sock: socket.socket, greeting: Callable[[int], bytes] | None = None
    ) -> None: ...


class HybridSocket:
    """The listening socket at `path` (mode 0600); serves from its construction until `aclose()`.

    Raises OSError when `path` exists or cannot be bound. A client has `line_limit_s` for its first line;
    how long the guest may take to answer is up to the client.
    """

    def __init__(self, device: Attachable, path: Path, *, line_limit_s: float = _LINE_LIMIT_S) -> None:
        self._device = device
        self._path = path
        self._line_limit_s = line_limit_s
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # The file takes its mode from the socket: at no time can others connect.
            os.fchmod(self._listener.fileno(), 0o600)
            self._listener.bind(str(path))
            self._listener.listen(_MAX_HANDSHAKES)
        except BaseException:
            self._listener.close()
            raise
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener, self._on_client)

    async def aclose(self) -> None:
        """Stop listening, remove the path, end handshakes. Streams already open go on. Idempotent."""
        if self._listener.fileno() < 0:
            return
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._path.unlink(missing_ok=True)
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _on_client(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # gone again, or we are out of descriptors: nothing to answer to
            return
        if len(self._handshakes) >= _MAX_HANDSHAKES:
            client.close()
            return
        client.setblocking(False)
        task = self._loop.create_task(self._handshake(client))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    async def _handshake(self, client: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._line_limit_s):
                port = _parse(await self._read_line(client))
            await self._device.attach(port, client, lambda host_port: b"OK %d\n" % host_port)
        except (OSError, ValueError):  # also TimeoutError; the closed connection is the answer
            client.close()
        except BaseException:
            client.close()
            raise

    async def _read_line(self, client: socket.socket) -> bytes:
        """The first line, without a byte of what follows it: that is the guest's."""
        line = bytearray()
        while not line.endswith(b"\n"):
            byte = await self._loop.sock_recv(client, 1)
            if not byte or len(line) == _MAX_LINE_BYTES:
                raise ValueError("no line")
            line += byte
        return bytes(line)


def _parse(line: bytes) -> int:
    """The port of `CONNECT <port>`. Raises ValueError."""
    words = line.split()
    if len(words) != 2 or words[0].lower() != b"connect" or not words[1].isdigit():
        raise ValueError(f"want CONNECT <port>, got {line!r}")
    port = int(words[1])
    if port > _MAX_PORT:
        raise ValueError(f"port {port} is above {_MAX_PORT}")
    return port
