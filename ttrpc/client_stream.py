"""A stream as its caller sees it: any number of messages out, any number in."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Generic

from ttrpc.deadline import deadline_exceeded, remaining
from ttrpc.envelope import decode_response, encode_request
from ttrpc.inbox import Inbox, Incoming
from ttrpc.service import RequestT, ResponseT
from ttrpc.status import Code, RpcError, StreamClosed
from ttrpc.wire import DATA, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from types import TracebackType

    from ttrpc.client_connection import ClientConnection
    from ttrpc.service import Method


class ClientStream(Generic[RequestT, ResponseT]):
    """One streaming call. Comes from `Client.stream()`; lives inside its `async with`.

    Iterate over it for the messages of the server, or await `response()` for the single one of a method that
    streams to the server only. Leaving the block early forgets the stream: ttRPC has no message that
    tells the server, so it works on until its deadline or until the connection closes.
    """

    def __init__(
        self,
        opened: Callable[[float | None], Awaitable[ClientConnection]],
        service: str,
        method: Method[RequestT, ResponseT],
        request: RequestT | None,
        deadline: float | None,
        metadata: Mapping[str, str | Sequence[str]] | None,
    ) -> None:
        self._opened = opened
        self._service = service
        self._method = method
        self._request = request
        self._deadline = deadline
        self._metadata = metadata
        self._stream_id = 0
        self._send_closed = not method.client_streaming
        self._timer: asyncio.TimerHandle | None = None
        self._connection: ClientConnection
        self._inbox: Inbox
        self._messages: Incoming[ResponseT]

    async def __aenter__(self) -> ClientStream[RequestT, ResponseT]:
        connection = await self._opened(self._deadline)
        payload = b"" if self._request is None else self._request.SerializeToString()
        body = encode_request(
            self._service, self._method.name, payload, remaining(self._deadline), self._metadata
        )
        self._connection = connection
        self._inbox = Inbox(connection)
        self._messages = Incoming(self._inbox, self._method.response, Code.INTERNAL)
        flags = REMOTE_CLOSED if self._send_closed else REMOTE_OPEN
        self._stream_id = connection.start_stream(body, flags, self)
        if self._deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(self._deadline, self._expire)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._finish(None)
        self._inbox.discard()

    # What the caller does

    async def send(self, message: RequestT) -> None:
        """Send one message; waits while the server is slow to read.

        Raises:
            StreamClosed: after `close_send()`, or the server has finished the stream successfully.
            RpcError: the server has ended the stream with this error; DEADLINE_EXCEEDED; RESOURCE_EXHAUSTED when the
                message is too large, after which the stream can still be used.
            ConnectionClosed: the connection is gone.
        """
        data = message.SerializeToString()
        if self._connection.write_blocked:
            await self._drained()
        self._inbox.raise_end()
        if self._send_closed or self._inbox.ended:
            raise StreamClosed
        self._connection.send(self._stream_id, DATA, 0, data)

    async def close_send(self) -> None:
        """Tell the server that there are no more messages. The answer can still be received. May be repeated."""
        if self._connection.write_blocked and not self._inbox.ended:
            await self._drained()
        if not self._send_closed and not self._inbox.ended:
            # An empty frame of its own: not every server takes a message along with the end.
            self._connection.send(self._stream_id, DATA, REMOTE_CLOSED | NO_DATA, b"")
        self._send_closed = True

    async def response(self) -> ResponseT:
        """The single response of a method that streams to the server only; closes our side first.

        Raises:
            RpcError: the status of the call, as for a unary call.
        """
        await self.close_send()
        async for message in self._messages:
            return message
        raise RpcError(Code.INTERNAL, "server ended the stream without a response")

    def __aiter__(self) -> AsyncIterator[ResponseT]:
        """The messages of the server until it ends the stream. Raises RpcError when it ends with an error."""
        return self._messages

    # What the connection does

    def response_received(self, data: bytearray) -> None:
        try:
            payload = decode_response(data)
        except RpcError as error:
            self._finish(error)
            return
        # With a server stream, an empty final response is just its end.
        if payload or not self._method.server_streaming:
            self._inbox.put(payload)
        self._finish(None)

    def data_received(self, flags: int, data: bytearray) -> None:
        if not self._method.server_streaming:
            self._finish(RpcError(Code.INTERNAL, "server sent stream data where one response is due"))
            return
        if not flags & NO_DATA:
            self._inbox.put(data)
        if flags & REMOTE_CLOSED:
            # A server closes its side last, so the stream is finished even when our side is still open.
            self._finish(None)

    def fail(self, error: RpcError) -> None:
        self._finish(error)

    def _expire(self) -> None:
        self._finish(deadline_exceeded())

    def _finish(self, error: RpcError | None) -> None:
        self._inbox.end(error)
        self._connection.forget(self._stream_id)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _drained(self) -> None:
        try:
            async with asyncio.timeout_at(self._deadline):
                await self._connection.drained()
        except TimeoutError:
            raise deadline_exceeded() from None
