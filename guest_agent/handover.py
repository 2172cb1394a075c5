"""Connections of the guest that the host takes over: it gets a token for one, connects to a port of vsock and shows it.

A token is good for one connection, and for some time.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

from agent_proto.relay import SOCKETS_PORT, TOKEN_BYTES, relay

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from guest_agent.log import Log

#: How long a connection waits for the host, and how long one of the host may take to name it.
TOKEN_LIMIT_S = 30.0
BACKLOG = 128
#: When the guest has no descriptors left for a connection.
PAUSE_S = 1.0


class Handover:
    """What waits for the host, and what it has taken over. With another `family` the host comes to `address`, a socket
    of this machine, for tests."""

    def __init__(
        self,
        log: Log,
        *,
        family: int = socket.AF_VSOCK,
        address: tuple[int, int] | str = (socket.VMADDR_CID_ANY, SOCKETS_PORT),
    ) -> None:
        self._log = log
        self._family = family
        self._address = address
        self._waiting: dict[bytes, socket.socket] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._for_host: socket.socket | None = None

    def prepare(self) -> None:
        """Listen for the host, from the first call on. Raises OSError."""
        if self._for_host is None:
            sock = socket.socket(
                self._family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )
            try:
                sock.bind(self._address)
                sock.listen(BACKLOG)
            except BaseException:
                sock.close()
                raise
            self._for_host = sock
            self._run(self._accept_host(sock))

    def token_for(self, program: socket.socket) -> bytes:
        """Keep a connected, non-blocking socket for the host, which is to show the token."""
        token = os.urandom(TOKEN_BYTES)
        self._waiting[token] = program
        asyncio.get_running_loop().call_later(TOKEN_LIMIT_S, self._give_up, token)
        return token

    def _give_up(self, token: bytes) -> None:
        program = self._waiting.pop(token, None)
        if program is not None:
            program.close()

    async def _accept_host(self, sock: socket.socket) -> None:
        with sock:
            while True:
                try:
                    host, _ = await asyncio.get_running_loop().sock_accept(sock)
                except OSError as err:
                    self._log.warning("connection_of_host_not_accepted", error=str(err))
                    await asyncio.sleep(PAUSE_S)
                    continue
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
