"""The server: what it answers, where it listens, and how it ends."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from ttrpc.acceptor import Acceptor
from ttrpc.registry import Registry
from ttrpc.server_connection import ServerConnection

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

    from ttrpc.service import Handler, Interceptor, Service
    from ttrpc.status import Status

log = logging.getLogger("ttrpc")

# Calls that may run at once on one connection; the next is refused with RESOURCE_EXHAUSTED. Most of them only wait, and
# a peer may have several for each process that it follows, so that hundreds of processes must not come near it.
MAX_CONCURRENT_CALLS = 1 << 15


class Server:
    """Answers calls on any number of connections.

    A handler's error answers its own call and reaches no other. When a client goes away its running handlers
    are cancelled; work that must be finished anyway belongs in a task of its own.
    """

    def __init__(
        self,
        error_status: Callable[[Exception], Status] | None = None,
        interceptor: Interceptor | None = None,
        *,
        max_concurrent_calls: int = MAX_CONCURRENT_CALLS,
    ) -> None:
        """
        Args:
            error_status: turns an exception of a handler into a status; asked for everything but RpcError and
                TimeoutError. Without it, such an exception is logged and answered with INTERNAL and the
                name of its type.
            interceptor: `await interceptor(call, request, next)` runs around every handler and returns the
                response, usually `await next(request, call)`. It may raise what a handler may raise.
            max_concurrent_calls: limit of running calls per connection.
        """
        self._registry = Registry(error_status, interceptor)
        self._max_calls = max_concurrent_calls
        self._acceptors: set[Acceptor] = set()
        self._connections: set[ServerConnection] = set()
        self._serving: set[asyncio.Task[None]] = set()
        self._closing = False

    def register(self, service: Service, handlers: Mapping[str, Handler]) -> None:
        """Answer `service` with these handlers, by method name. Methods without one answer UNIMPLEMENTED.

        Raises:
            ValueError: the service is registered already, or a handler's name is none of its methods.
        """
        self._registry.register(service, handlers)

    @property
    def active_calls(self) -> int:
        """Handlers that are running now, on all connections."""
        return sum(connection.active_calls for connection in self._connections)

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections from a listening socket until `aclose()`; then return. Closes the listener.

        Cancelling it stops accepting, while connections live on until they end or `aclose()`.

        Raises:
            OSError: the listener failed for good. Running out of file descriptors is not such a failure: that is
                logged, and accepting goes on a second later.
            RuntimeError: the server is closed.
        """
        if self._closing:
            listener.close()
            raise RuntimeError("the server is closed")
        acceptor = Acceptor(listener, self._accepted)
        self._acceptors.add(acceptor)
        try:
            await acceptor.run()
        finally:
            self._acceptors.discard(acceptor)

    async def serve_connection(self, connected: socket.socket) -> None:
        """Answer calls on one connected stream socket until it ends. Takes the socket over and closes it.

        Cancelling it closes the connection and cancels its handlers.

        Raises:
            ValueError: not a stream socket.
            RuntimeError: the server is closed.
        """
        if self._closing:
            connected.close()
            raise RuntimeError("the server is closed")
        connection = ServerConnection(self._registry, self._max_calls)
        self._connections.add(connection)
        try:
            try:
                connected.setblocking(False)
                await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, connected)
            except (OSError, ValueError):
                connected.close()
                raise
            try:
                await connection.finished()
            except asyncio.CancelledError:
                connection.abort()
                await connection.finished()
                raise
        finally:
            self._connections.discard(connection)

    async def aclose(self, grace_s: float = 0.0) -> None:
        """Stop accepting, refuse new calls, let running calls finish for up to `grace_s` seconds, then cancel them.

        Returns when no handler runs any more, so a handler that does not end when cancelled is waited for; a
        handler must therefore not await this itself. Answers are flushed to clients that read them.
        """
        self._closing = True
        for acceptor in self._acceptors:
            acceptor.stop()
        connections = list(self._connections)
        for connection in connections:
            connection.drain()
        ends = [asyncio.ensure_future(connection.finished()) for connection in connections]
        if ends and grace_s > 0:
            await asyncio.wait(ends, timeout=grace_s)
        for connection in connections:
            connection.end_now()
        if ends:
            await asyncio.wait(ends)
        if self._serving:
            await asyncio.wait(self._serving)

    def _accepted(self, connected: socket.socket) -> None:
        task = asyncio.get_running_loop().create_task(self._serve_accepted(connected))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve_accepted(self, connected: socket.socket) -> None:
        if self._closing:
            connected.close()
            return
        try:
            await self.serve_connection(connected)
        except OSError as error:
            log.warning("accepted connection failed: %s", error)
