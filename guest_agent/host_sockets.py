"""Unix sockets that stand for sockets of the host: a program that connects here is connected there, over vsock.

The host asks for the next program only when it can take one more, and nobody is accepted before: the others wait in the
kernel's queue. So there is never more here than the host has asked for.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agent_proto.relay import SOCKETS_PORT, TOKEN_BYTES, relay
from guest_agent.errors import AlreadyExists, InvalidRequest, NotFound

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from guest_agent.log import Log

#: How long a program that was accepted waits for the host, and a connection of the host may take to name it.
TOKEN_LIMIT_S = 30.0
BACKLOG = 128


class _Listener:
    def __init__(self, path: str, sock: socket.socket) -> None:
        self.path = path
        self.sock = sock
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class HostSockets:
    """The sockets by name, each in `base`. For the host there is one on vsock as soon as there is one of these; with
    another `family` it is one of this machine, for tests."""

    def __init__(self, base: str, log: Log, *, family: int = socket.AF_VSOCK) -> None:
        self._base = base
        self._log = log
        self._family = family
        self._listeners: dict[str, _Listener] = {}
        # Accepted programs, by the token that the host has to show.
        self._waiting: dict[bytes, socket.socket] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._for_host: socket.socket | None = None

    def listen(self, name: str, mode: int, uid: int, gid: int) -> None:
        """Make a socket. Raises InvalidRequest, AlreadyExists, OSError."""
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise InvalidRequest(f"{name!r} cannot be the name of a socket")
        if name in self._listeners:
            raise AlreadyExists(f"there is a socket {name} already")
        self._listen_for_host()
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
        token = os.urandom(TOKEN_BYTES)
        self._waiting[token] = program
        loop.call_later(TOKEN_LIMIT_S, self._give_up, token)
        return token

    def close(self, name: str) -> None:
        """Remove a socket. Harmless when there is none. Raises OSError."""
        listener = self._listeners.pop(name, None)
        if listener is not None:
            listener.closed.set_result(None)
            # Whoever waits for a program stops first.
            asyncio.get_running_loop().call_soon(listener.sock.close)
            os.unlink(listener.path)

    def _give_up(self, token: bytes) -> None:
        program = self._waiting.pop(token, None)
        if program is not None:
            program.close()

    def _listen_for_host(self) -> None:
        if self._for_host is None:
            sock = socket.socket(
                self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )
            try:
                sock.bind(self._address())
                sock.listen(BACKLOG)
            except BaseException:
                sock.close()
                raise
            self._for_host = sock
            self._run(self._accept_host(sock))

    def _address(self) -> tuple[int, int] | str:
        return (
            (socket.VMADDR_CID_ANY, SOCKETS_PORT) if self._family == socket.AF_VSOCK else f"{self._base}.host"
        )

    async def _accept_host(self, sock: socket.socket) -> None:
        with sock:
            while True:
                host, _ = await asyncio.get_running_loop().sock_accept(sock)
                self._run(self._join(host))

    async def _join(self, host: socket.socket) -> None:
        with host:
            program = await self._program_for(host)
            if program is None:
                return
            with program:
                try:
                    await relay(host, program)
                except OSError as err:
                    self._log.debug("connection_to_host_broke", error=str(err))

    async def _program_for(self, host: socket.socket) -> socket.socket | None:
        token = b""
        try:
            async with asyncio.timeout(TOKEN_LIMIT_S):
                while len(token) < TOKEN_BYTES:
                    data = await asyncio.get_running_loop().sock_recv(host, TOKEN_BYTES - len(token))
                    if not data:
                        return None
                    token += data
        except (OSError, TimeoutError):
            return None
        return self._waiting.pop(token, None)

    def _run(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
