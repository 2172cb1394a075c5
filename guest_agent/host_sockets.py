"""Unix sockets that stand for sockets of the host: a program that connects here is connected there (`Handover`).

The host asks for the next program only when it can take one more, and nobody is accepted before: the others wait in the
kernel's queue. So there is never more here than the host has asked for.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from guest_agent.errors import AlreadyExists, InvalidRequest, NotFound

if TYPE_CHECKING:
    from guest_agent.handover import Handover

BACKLOG = 128


class _Listener:
    def __init__(self, path: str, sock: socket.socket) -> None:
        self.path = path
        self.sock = sock
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class HostSockets:
    """The sockets by name, each in `base`."""

    def __init__(self, base: str, handover: Handover) -> None:
        self._base = base
        self._handover = handover
        self._listeners: dict[str, _Listener] = {}

    def listen(self, name: str, mode: int, uid: int, gid: int) -> None:
        """Make a socket. Raises InvalidRequest, AlreadyExists, OSError."""
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise InvalidRequest(f"{name!r} cannot be the name of a socket")
        if name in self._listeners:
            raise AlreadyExists(f"there is a socket {name} already")
        self._handover.prepare()
        os.makedirs(self._base, mode=0o755, exist_ok=True)
        path = f"{self._base}/{name}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.bind(path)
            os.chown(path, uid, gid)
            os.chmod(path, mode & 0o7777)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            with suppress(FileNotFoundError):
                os.unlink(path)
            raise
        self._listeners[name] = _Listener(path, sock)

    async def next_connection(self, name: str) -> bytes:
        """Wait for a program that connects; returns the token for it. Raises NotFound, OSError."""
        listener = self._listeners.get(name)
        if listener is None:
            raise NotFound(f"there is no socket {name!r}")
        loop = asyncio.get_running_loop()
        accepting = loop.create_task(loop.sock_accept(listener.sock))
        try:
            either: list[asyncio.Future[Any]] = [accepting, listener.closed]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not accepting.done():
                raise NotFound(f"socket {name} is closed")
            program, _ = accepting.result()
        finally:
            accepting.cancel()
        return self._handover.token_for(program)

    def close(self, name: str) -> None:
        """Remove a socket. Harmless when there is none. Raises OSError."""
        listener = self._listeners.pop(name, None)
        if listener is not None:
            listener.closed.set_result(None)
            # Whoever waits for a program stops first.
            asyncio.get_running_loop().call_soon(listener.sock.close)
            os.unlink(listener.path)
