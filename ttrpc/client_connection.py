"""The client's end of a connection: stream ids, and who waits for which answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ttrpc.connection import Connection
from ttrpc.deadline import deadline_exceeded
from ttrpc.status import Code, RpcError
from ttrpc.wire import DATA, MAX_STREAM_ID, REQUEST, RESPONSE, too_large

if TYPE_CHECKING:
    import asyncio
    from typing import Protocol

    class Stream(Protocol):
        """A stream that is open at the client."""

        def response_received(self, data: bytearray) -> None: ...
        def data_received(self, flags: int, data: bytearray) -> None: ...
        def fail(self, error: RpcError) -> None: ...


# What a unary call waits for: the body of its response, or the error that ends it. The error is a value and not the
# future's exception, which asyncio reports as "never retrieved" when the caller is cancelled at the same moment.
Reply = bytearray | RpcError


class ClientConnection(Connection):
    """Gives out stream ids, hands received frames to the calls they belong to, fails all of them at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._next_id = 1
        self._calls: dict[int, asyncio.Future[Reply]] = {}
        self._streams: dict[int, Stream] = {}

    # Opening and forgetting streams. The id is taken and the frame is written without an await in between, because
    # ids must rise in the order of the frames.

    def start_call(self, request: bytes) -> tuple[int, asyncio.Future[Reply]]:
        """Write a unary request; the future gets the reply.

        Raises:
            ConnectionClosed: the connection is gone.
            RpcError: RESOURCE_EXHAUSTED, all stream ids of this connection are used up.
        """
        stream_id = self._open(request, 0)
        reply = self._calls[stream_id] = self._loop.create_future()
        return stream_id, reply

    def start_stream(self, request: bytes, flags: int, stream: Stream) -> int:
        """Write the request of a stream, which gets the frames of the answer. Raises as `start_call`."""
        stream_id = self._open(request, flags)
        self._streams[stream_id] = stream
        return stream_id

    def forget(self, stream_id: int) -> None:
        """Ignore whatever still arrives for this stream."""
        self._calls.pop(stream_id, None)
        self._streams.pop(stream_id, None)

    def _open(self, request: bytes, flags: int) -> int:
        if self.is_lost:
            raise self.closed_error()
        stream_id = self._next_id
        if stream_id > MAX_STREAM_ID:
            raise RpcError(Code.RESOURCE_EXHAUSTED, "all stream ids of this connection are used up")
        self.send(stream_id, REQUEST, flags, request)
        self._next_id += 2
        return stream_id

    # Frames. One for a stream that nobody waits for is late: its call was cancelled or has timed out.

    def frame_received(self, stream_id: int, kind: int, flags: int, data: bytearray) -> None:
        if kind == RESPONSE:
            reply = self._calls.pop(stream_id, None)
            if reply is not None:
                _settle(reply, data)
            elif (stream := self._streams.get(stream_id)) is not None:
                stream.response_received(data)
        elif kind == DATA:
            if (stream := self._streams.get(stream_id)) is not None:
                stream.data_received(flags, data)
            else:
                self._fail(
                    stream_id, RpcError(Code.INTERNAL, "server answered a unary call with stream data")
                )

    def oversized_received(self, stream_id: int, kind: int, length: int) -> None:
        if kind in (RESPONSE, DATA):
            self._fail(stream_id, too_large(length))

    def lost(self) -> None:
        for stream_id in (*self._calls, *self._streams):
            self._fail(stream_id, self.closed_error())

    def _fail(self, stream_id: int, error: RpcError) -> None:
        reply = self._calls.pop(stream_id, None)
        if reply is not None:
            _settle(reply, error)
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            stream.fail(error)


def _settle(reply: asyncio.Future[Reply], result: Reply) -> None:
    if not reply.done():
        reply.set_result(result)


def expire(reply: asyncio.Future[Reply]) -> None:
    """The deadline of a unary call has passed."""
    _settle(reply, deadline_exceeded())
