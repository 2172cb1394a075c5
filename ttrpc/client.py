"""The client: unary calls and streams over one connection."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

from ttrpc.client_connection import ClientConnection, expire
from ttrpc.client_stream import ClientStream
from ttrpc.deadline import deadline_after, deadline_exceeded, remaining
from ttrpc.envelope import decode_response, encode_request, parse
from ttrpc.status import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from ttrpc.service import Method, RequestT, ResponseT


class Client:
    """Any number of concurrent calls over one connection. An async context manager that closes it."""

    def __init__(self, connection: ClientConnection, opening: asyncio.Task[None]) -> None:
        """Use `from_socket` or `connect_unix`."""
        self._connection = connection
        self._opening = opening

    @classmethod
    def from_socket(cls, connected: socket.socket) -> Client:
        """A client on a connected stream socket of any family. Takes the socket over. Needs a running event loop.

        Raises:
            ValueError: not a stream socket.
        """
        if connected.type != socket.SOCK_STREAM:
            raise ValueError(f"ttrpc needs a stream socket, not {connected!r}")
        connected.setblocking(False)
        connection = ClientConnection()
        return cls(connection, asyncio.get_running_loop().create_task(_open(connection, connected)))

    @classmethod
    async def connect_unix(cls, path: str | Path) -> Client:
        """Connect to a Unix socket.

        Raises:
            OSError: the connection was refused, or there is no such socket.
        """
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            await asyncio.get_running_loop().sock_connect(connected, str(path))
        except BaseException:
            connected.close()
            raise
        return cls.from_socket(connected)

    async def call(
        self,
        service: str,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | Sequence[str]] | None = None,
    ) -> ResponseT:
        """Make a unary call. Cancelling it forgets it; the server is not told, ttRPC has no message for that.

        Args:
            service: full name, such as "grpc.Health".
            timeout_s: limit for the whole call. The server is told what is left of it when the request is written.
            metadata: sent along; keys are lower-cased.

        Raises:
            RpcError: the server's status; DEADLINE_EXCEEDED, by our clock or the server's; RESOURCE_EXHAUSTED when
                request or response are over the size limit; INTERNAL when the answer is malformed.
            ConnectionClosed: the connection was or went away. An `RpcError` too, UNAVAILABLE.
        """
        if method.client_streaming or method.server_streaming:
            raise ValueError(f"{service}/{method.name} is a streaming method")
        payload = request.SerializeToString()
        deadline = deadline_after(timeout_s)
        connection = self._connection
        if connection.write_blocked:
            await self._ready(deadline)
        body = encode_request(service, method.name, payload, remaining(deadline), metadata)
        stream_id, reply = connection.start_call(body)
        timer = None if deadline is None else reply.get_loop().call_at(deadline, expire, reply)
        try:
            result = await reply
        finally:
            connection.forget(stream_id)
            if timer is not None:
                timer.cancel()
        if isinstance(result, RpcError):
            raise result
        return parse(method.response, decode_response(result), Code.INTERNAL)

    def stream(
        self,
        service: str,
        method: Method[RequestT, ResponseT],
        request: RequestT | None = None,
        timeout_s: float | None = None,
        metadata: Mapping[str, str | Sequence[str]] | None = None,
    ) -> ClientStream[RequestT, ResponseT]:
        """A streaming call, opened by `async with`, which raises what `call` raises before its answer.

        `request` is for methods that do not stream to the server, and those need one. `timeout_s`
        counts from here and limits the whole stream.
        """
        if not (method.client_streaming or method.server_streaming):
            raise ValueError(f"{service}/{method.name} is a unary method")
        if method.client_streaming != (request is None):
            raise ValueError(f"{service}/{method.name} takes {'no request' if request else 'a request'} here")
        deadline = deadline_after(timeout_s)
        return ClientStream(self._ready, service, method, request, deadline, metadata)

    @property
    def closed(self) -> bool:
        """The connection is gone, or was never opened; every call raises ConnectionClosed."""
        return self._connection.is_lost

    async def wait_closed(self) -> None:
        """Wait until the connection is gone, whoever closes it. Returns at once when it is."""
        await self._connection.wait_lost()

    async def aclose(self) -> None:
        """Close the connection. Every pending call raises ConnectionClosed. May be repeated."""
        self._connection.abort()
        await self._connection.wait_lost()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _ready(self, deadline: float | None) -> ClientConnection:
        """Wait until a frame may be written."""
        try:
            async with asyncio.timeout_at(deadline):
                await self._connection.drained()
        except TimeoutError:
            raise deadline_exceeded() from None
        return self._connection


async def _open(connection: ClientConnection, connected: socket.socket) -> None:
    # A task, so that a client can be made without an await: its first call waits for it like for a slow server.
    try:
        await asyncio.get_running_loop().create_connection(lambda: connection, sock=connected)
    except (OSError, ValueError) as error:
        connected.close()
        connection.connection_lost(error if isinstance(error, OSError) else OSError(str(error)))
