"""Connections of the host to ports of the guest's loopback, which it takes over (`Handover`)."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from guest_agent.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from guest_agent.handover import Handover

#: The server's queue may be full, and TCP then tries again after 1, 3 and 7 seconds.
CONNECT_LIMIT_S = 10.0
_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_LAST_PORT = 65535


async def connect(port: int, handover: Handover) -> bytes:
    """The token for a connection to who listens at the port, at 127.0.0.1 or else at ::1.

    Raises:
        InvalidRequest: no port.
        NotFound: nobody listens there.
        OSError, TimeoutError: it cannot be connected to.
    """
    if not 0 < port <= _LAST_PORT:
        raise InvalidRequest(f"{port} is no TCP port")
    handover.prepare()
    for family, address in _ADDRESSES:
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        except OSError:  # a kernel without IPv6
            continue
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                await asyncio.get_running_loop().sock_connect(sock, (address, port))
        except BaseException as err:
            sock.close()
            # Without IPv6 addresses there is no way to the second one.
            if isinstance(err, ConnectionRefusedError) or (
                family == socket.AF_INET6 and isinstance(err, OSError) and not isinstance(err, TimeoutError)
            ):
                continue
            raise
        return handover.token_for(sock)
    raise NotFound(f"nobody listens at port {port} of the guest's loopback")
