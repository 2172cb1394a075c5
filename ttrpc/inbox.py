"""The bounded queue between a connection and the one consumer of a stream."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Generic

from ttrpc.envelope import MessageT, parse

if TYPE_CHECKING:
    from ttrpc.connection import Connection
    from ttrpc.status import Code, RpcError

# A stream with this much waiting stops the reading of its connection until half of it is consumed. ttRPC has no
# flow control of its own, so the only way to slow a sender down is its socket.
MAX_MESSAGES = 64
MAX_BYTES = 1024 * 1024


class Inbox:
    """Messages of one stream, received and not yet consumed, then the end of the stream."""

    __slots__ = ("_bytes", "_connection", "_end", "_ended", "_messages", "_waiter")

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._messages: deque[bytes | bytearray] = deque()
        self._bytes = 0
        self._ended = False
        self._end: RpcError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Nothing more can arrive; there may still be messages to consume."""
        return self._ended

    def put(self, data: bytes | bytearray) -> None:
        self._messages.append(data)
        self._bytes += len(data)
        if len(self._messages) >= MAX_MESSAGES or self._bytes >= MAX_BYTES:
            self._connection.hold_reading(self)
        self._wake()

    def end(self, error: RpcError | None = None) -> None:
        """No more messages. `error` is raised to the consumer after the messages before it. The first end wins."""
        if not self._ended:
            self._ended = True
            self._end = error
            self._wake()

    def raise_end(self) -> None:
        """Raises the error that ended the stream, if one did."""
        if self._end is not None:
            raise self._end

    def discard(self) -> None:
        """Nobody will consume what is here."""
        self._messages.clear()
        self._bytes = 0
        self._connection.release_reading(self)

    async def get(self) -> bytes | bytearray | None:
        """The next message, or None at the end.

        Raises:
            RpcError: the stream ended with this error.
            RuntimeError: another task is already waiting for the next message.
        """
        while not self._messages:
            if self._ended:
                self.raise_end()
                return None
            await self._arrival()
        data = self._messages.popleft()
        self._bytes -= len(data)
        if len(self._messages) <= MAX_MESSAGES // 2 and self._bytes <= MAX_BYTES // 2:
            self._connection.release_reading(self)
        return data

    async def _arrival(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks receive from the same stream")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Incoming(Generic[MessageT]):
    """An async iterator over the messages of an inbox, decoded one by one when they are asked for."""

    __slots__ = ("_code", "_inbox", "_kind")

    def __init__(self, inbox: Inbox, kind: type[MessageT], malformed: Code) -> None:
        """`malformed` is the code of the RpcError for a message that does not decode."""
        self._inbox = inbox
        self._kind = kind
        self._code = malformed

    def __aiter__(self) -> Incoming[MessageT]:
        return self

    async def __anext__(self) -> MessageT:
        data = await self._inbox.get()
        if data is None:
            raise StopAsyncIteration
        return parse(self._kind, data, self._code)
