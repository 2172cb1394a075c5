"""One accepted connection: requests in, a task for each, answers out.

A call is active from the moment its task is created until that task is done, whatever it was answered in
between; the done callback of the task is the only place that ends it.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from ttrpc.connection import Connection
from ttrpc.deadline import deadline_exceeded
from ttrpc.envelope import decode_metadata, decode_request, encode_response, encode_status, parse
from ttrpc.inbox import Inbox, Incoming
from ttrpc.service import Call
from ttrpc.status import Code, RpcError, Status, StreamClosed
from ttrpc.wire import DATA, NO_DATA, REMOTE_CLOSED, REMOTE_OPEN, REQUEST, RESPONSE, too_large

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from ttrpc.registry import Endpoint, Registry


class ActiveCall:
    """The server's side of one stream."""

    __slots__ = ("answered", "call", "endpoint", "inbox", "stream_id", "task")

    task: asyncio.Task[None]

    def __init__(self, stream_id: int, endpoint: Endpoint, call: Call, inbox: Inbox | None) -> None:
        self.stream_id = stream_id
        self.endpoint = endpoint
        self.call = call
        # Messages of a client stream; None when the method takes a single request.
        self.inbox = inbox
        # The final frame was written, or nobody is there to read it.
        self.answered = False


class ServerConnection(Connection):
    """Dispatches the frames of one client."""

    def __init__(self, registry: Registry, max_concurrent_calls: int) -> None:
        super().__init__()
        self._registry = registry
        self._max_calls = max_concurrent_calls
        self._calls: dict[int, ActiveCall] = {}
        self._last_id = 0
        self._draining = False
        self._hurried = False
        self._finished = asyncio.Event()

    @property
    def active_calls(self) -> int:
        return len(self._calls)

    async def finished(self) -> None:
        """Wait until the connection is gone and no handler of it runs any more."""
        await self._finished.wait()

    # Ending

    def drain(self) -> None:
        """Refuse new calls, close as soon as the running ones are answered."""
        self._draining = True
        if not self._calls:
            self.close_when_flushed()

    def end_now(self) -> None:
        """Cancel every handler, each of which answers CANCELLED, and close when the last one is done."""
        self._draining = self._hurried = True
        for active in self._calls.values():
            active.task.cancel()
        if not self._calls:
            self.abort()

    def lost(self) -> None:
        # The client is gone, and with it the only reader of the answers.
        for active in self._calls.values():
            active.answered = True
            active.task.cancel()
        self._check_finished()

    def _call_done(self, stream_id: int, task: asyncio.Task[None]) -> None:
        active = self._calls.pop(stream_id)
        if active.inbox is not None:
            active.inbox.discard()
        if not task.cancelled():
            task.result()  # answering cannot fail; if it does, the event loop has to report it
        if self._draining and not self._calls:
            # A client that does not read would keep the connection open for ever.
            if self._hurried:
                self.abort()
            else:
                self.close_when_flushed()
        self._check_finished()

    def _check_finished(self) -> None:
        if self.is_lost and not self._calls:
            self._finished.set()

    # A slow client: while it does not take our answers, it gets no new calls in. That bounds what we hold for it.

    def pause_writing(self) -> None:
        super().pause_writing()
        self.hold_reading(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self.release_reading(self)

    # Frames

    def frame_received(self, stream_id: int, kind: int, flags: int, data: bytearray) -> None:
        if kind == REQUEST:
            try:
                self._open(stream_id, flags, data)
            except RpcError as error:
                self._refuse(stream_id, error.status)
        elif kind == DATA:
            self._data_received(stream_id, flags, data)
        # Other types are for future versions of the protocol, which asks to ignore them.

    def oversized_received(self, stream_id: int, kind: int, length: int) -> None:
        if kind == REQUEST:
            try:
                self._take_id(stream_id)
            except RpcError as error:
                self._refuse(stream_id, error.status)
            else:
                self._refuse(stream_id, too_large(length).status)
        elif kind == DATA:
            self._end_early(stream_id, too_large(length).status)

    def _open(self, stream_id: int, flags: int, data: bytearray) -> None:
        """Start the call that a request frame asks for, or raise the RpcError that answers it."""
        self._take_id(stream_id)
        if self._draining:
            raise RpcError(Code.UNAVAILABLE, "server is closing")
        if len(self._calls) >= self._max_calls:
            raise RpcError(
                Code.RESOURCE_EXHAUSTED, f"connection has {self._max_calls} calls running, which is its limit"
            )
        request = decode_request(data)
        endpoint = self._registry.find(request.service, request.method)
        deadline = None
        if request.timeout_nano:
            if request.timeout_nano < 0:
                raise deadline_exceeded()
            deadline = self._loop.time() + request.timeout_nano / 1e9
        call = Call(request.service, request.method, decode_metadata(request), deadline)
        inbox = self._client_stream(flags, request.payload) if endpoint.method.client_streaming else None
        active = ActiveCall(stream_id, endpoint, call, inbox)
        active.task = self._loop.create_task(self._run(active, request.payload))
        self._calls[stream_id] = active
        active.task.add_done_callback(partial(self._call_done, stream_id))

    def _take_id(self, stream_id: int) -> None:
        if stream_id % 2 == 0:
            raise RpcError(Code.INVALID_ARGUMENT, "stream id of a client must be odd")
        if stream_id <= self._last_id:
            raise RpcError(Code.INVALID_ARGUMENT, "stream id must be higher than those before it")
        self._last_id = stream_id

    def _client_stream(self, flags: int, payload: bytes) -> Inbox:
        inbox = Inbox(self)
        # A request without flags is unary: its payload is a message, even when it is empty.
        if payload or not flags:
            inbox.put(payload)
        if not flags & REMOTE_OPEN or flags & REMOTE_CLOSED:
            inbox.end()
        return inbox

    def _data_received(self, stream_id: int, flags: int, data: bytearray) -> None:
        active = self._calls.get(stream_id)
        if active is None or active.answered:
            # Normal when we answered early and the client had already sent more.
            self._refuse(stream_id, Status(Code.INVALID_ARGUMENT, "stream is not active"))
            return
        if active.inbox is None:
            problem = "data on a stream whose method takes a single request"
        elif active.inbox.ended:
            problem = "data after the client closed its side of the stream"
        else:
            if not flags & NO_DATA:
                active.inbox.put(data)
            if flags & REMOTE_CLOSED:
                active.inbox.end()
            return
        self._end_early(stream_id, Status(Code.INVALID_ARGUMENT, problem))

    def _refuse(self, stream_id: int, status: Status) -> None:
        self.send(stream_id, RESPONSE, 0, encode_status(status))

    def _end_early(self, stream_id: int, status: Status) -> None:
        """Answer a stream whose client broke the rules; the handler, if it still runs, is cancelled."""
        active = self._calls.get(stream_id)
        if active is not None and not active.answered:
            active.answered = True
            active.task.cancel()
        self._refuse(stream_id, status)

    # Calls

    async def _run(self, active: ActiveCall, payload: bytes) -> None:
        try:
            await self._answer(active, payload)
        except asyncio.CancelledError:
            # Cancelled by aclose(), or the handler raised it by itself: a client that is still there must not wait
            # for an answer that never comes.
            if not active.answered:
                active.answered = True
                self._refuse(active.stream_id, Status(Code.CANCELLED, "call was cancelled by the server"))
            raise

    async def _answer(self, active: ActiveCall, payload: bytes) -> None:
        kind, flags = RESPONSE, 0
        try:
            if active.call.deadline is None:
                body = await self._handle(active, payload)
            else:
                async with asyncio.timeout_at(active.call.deadline):
                    body = await self._handle(active, payload)
            if body is None:
                kind, flags, body = DATA, REMOTE_CLOSED | NO_DATA, b""
        except Exception as error:
            body = encode_status(self._registry.status_of(error, active.call))
        if active.answered:
            return  # while the handler was busy with its own cancellation
        if self.write_blocked:
            await self.drained()
        active.answered = True
        self.send(active.stream_id, kind, flags, body)

    async def _handle(self, active: ActiveCall, payload: bytes) -> bytes | None:
        """The body of the final response, or None when the answer was a stream of messages that is now complete."""
        method = active.endpoint.method
        request: Any
        if active.inbox is None:
            request = parse(method.request, payload, Code.INVALID_ARGUMENT)
        else:
            request = Incoming(active.inbox, method.request, Code.INVALID_ARGUMENT)
        result = await self._registry.invoke(active.endpoint, request, active.call)
        if not method.server_streaming:
            return encode_response(_checked(result, method.response))
        await self._send_messages(active, result)
        return None

    async def _send_messages(self, active: ActiveCall, messages: Any) -> None:
        kind = active.endpoint.method.response
        try:
            async for message in messages:
                data = _checked(message, kind).SerializeToString()
                if self.write_blocked:
                    await self.drained()
                if active.answered:
                    raise StreamClosed
                self.send(active.stream_id, DATA, 0, data)
        finally:
            # A generator that is left early would otherwise be closed some time later, by the garbage collector.
            close = getattr(messages, "aclose", None)
            if close is not None:
                await close()


def _checked(result: Any, kind: type[Message]) -> Message:
    if not isinstance(result, kind):
        raise TypeError(f"handler returned {type(result).__name__}, its method returns {kind.__name__}")
    return result
