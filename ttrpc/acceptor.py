"""Accepting connections from a listening socket, also when the process is out of file descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

log = logging.getLogger("ttrpc")

# Connections taken in one go, so that a burst of them does not hold up the running calls.
BATCH = 64
# A full table of file descriptors leaves the listener readable; without a pause that would be a busy loop.
RETRY_S = 1.0

_OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# The connection that was to be accepted failed; the listener did not.
_CONNECTION_FAILED = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR}


class Acceptor:
    """Hands every connection of `listener` to `accepted`. Owns the listener: closes it when it stops."""

    __slots__ = ("_accepted", "_listener", "_loop", "_retry", "_retry_s", "_stopped")

    def __init__(
        self, listener: socket.socket, accepted: Callable[[socket.socket], None], *, retry_s: float = RETRY_S
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._accepted = accepted
        self._retry_s = retry_s
        self._retry: asyncio.TimerHandle | None = None
        self._stopped: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Accept until `stop()`.

        Raises:
            OSError: the listener itself failed.
        """
        try:
            self._listener.setblocking(False)
            self._loop.add_reader(self._listener, self._ready)
            await self._stopped
        finally:
            if self._retry is not None:
                self._retry.cancel()
            self._close()

    def stop(self) -> None:
        if not self._stopped.done():
            # Now, and not when run() wakes up: whoever connects from here on must be refused.
            self._close()
            self._stopped.set_result(None)

    def _close(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()

    def _ready(self) -> None:
        for _ in range(BATCH):
            try:
                connection, _peer = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _CONNECTION_FAILED:
                    continue
                self._failed(error)
                return
            self._accepted(connection)

    def _failed(self, error: OSError) -> None:
        self._loop.remove_reader(self._listener)
        if error.errno in _OUT_OF_RESOURCES:
            log.warning("cannot accept a connection, trying again in %s s: %s", self._retry_s, error)
            self._retry = self._loop.call_later(self._retry_s, self._try_again)
        elif not self._stopped.done():
            self._stopped.set_exception(error)

    def _try_again(self) -> None:
        if not self._stopped.done():
            self._loop.add_reader(self._listener, self._ready)
