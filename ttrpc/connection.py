"""What client and server connections share: frames in and out, and back-pressure in both directions."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ttrpc.status import ConnectionClosed
from ttrpc.wire import FrameReader, frame

if TYPE_CHECKING:
    from collections.abc import Hashable

# Bytes waiting in our own memory for a slow peer before senders are made to wait. Above the socket buffers of
# the kernel, about 200 KiB, so that a message of that size does not stop and restart the sender by itself.
WRITE_HIGH_WATER = 1024 * 1024


class Connection(asyncio.BufferedProtocol):
    """One connection. Subclasses say what a frame means and what the end of the connection means.

    Reading stops while anything holds it (`hold_reading`), so what a slow consumer does not take stays in
    the peer's socket. Writing never waits by itself: a sender awaits `drained()` first, and then writes
    without an await in between.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = FrameReader(self.frame_received, self.oversized_received)
        self._transport: asyncio.Transport | None = None
        self._read_holds: set[Hashable] = set()
        self._writable = asyncio.Event()
        self._lost = asyncio.Event()
        self._loss: Exception | None = None
        self._aborted = False
        # True while senders have to await drained(): not open yet, or the peer is slow. A plain attribute, since
        # every call looks at it.
        self.write_blocked = True

    # What subclasses say.

    def frame_received(self, stream_id: int, kind: int, flags: int, data: bytearray) -> None:
        raise NotImplementedError

    def oversized_received(self, stream_id: int, kind: int, length: int) -> None:
        raise NotImplementedError

    def lost(self) -> None:
        """The connection is gone. Called once."""
        raise NotImplementedError

    # What they use.

    @property
    def is_lost(self) -> bool:
        return self._lost.is_set()

    def closed_error(self) -> ConnectionClosed:
        """A new exception for each caller; its cause is the operating system's error, if there was one."""
        error = ConnectionClosed()
        error.__cause__ = self._loss
        return error

    def send(self, stream_id: int, kind: int, flags: int, data: bytes) -> None:
        """Write one frame. Frames go out in the order of these calls. On a lost connection nothing happens.

        Raises:
            RpcError: RESOURCE_EXHAUSTED, the data is too large; nothing was written.
        """
        data = frame(stream_id, kind, flags, data)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    async def drained(self) -> None:
        """Wait until the peer has taken enough of what was written before. The caller may then write one frame.

        Raises:
            ConnectionClosed: the connection is gone.
        """
        while self.write_blocked:
            if self._lost.is_set():
                raise self.closed_error()
            await self._writable.wait()

    async def wait_lost(self) -> None:
        await self._lost.wait()

    def hold_reading(self, owner: Hashable) -> None:
        """Read nothing more until `owner` releases it."""
        self._read_holds.add(owner)
        self._reader.pause()
        if self._transport is not None:
            self._transport.pause_reading()

    def release_reading(self, owner: Hashable) -> None:
        """Give up a hold; harmless when there is none."""
        if owner in self._read_holds:
            self._read_holds.discard(owner)
            # Not here and now: frames that wait in the buffer would be handled inside the consumer's call.
            self._loop.call_soon(self._resume_reading)

    def _resume_reading(self) -> None:
        if self._read_holds or self._transport is None or self._transport.is_closing():
            return
        self._reader.resume()
        if not self._read_holds:
            self._transport.resume_reading()

    def close_when_flushed(self) -> None:
        """Close after what was written has left our memory."""
        if self._transport is None:
            self.abort()
        else:
            self._transport.close()

    def abort(self) -> None:
        """Close now, or as soon as it is open. What the kernel has not taken yet is dropped."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        if self._aborted:
            transport.abort()
        else:
            self.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._reader.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        self._reader.received(nbytes)

    def pause_writing(self) -> None:
        self.write_blocked = True
        self._writable.clear()

    def resume_writing(self) -> None:
        self.write_blocked = False
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._reader.pause()
        self._loss = exc
        self._lost.set()
        # Every sender that waits must wake up and see that the connection is gone.
        self.write_blocked = True
        self._writable.set()
        self.lost()
