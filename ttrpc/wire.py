"""Frames: the ten byte header, message types, flags, the size limit, and cutting a byte stream into frames.

Pure bytes, no I/O. A frame is a header followed by its data:

    offset 0, 4 bytes   data length, big endian, header not counted
    offset 4, 4 bytes   stream id, big endian
    offset 8, 1 byte    message type
    offset 9, 1 byte    flags
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final

from ttrpc.status import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Callable

HEADER: Final = Struct(">IIBB")
HEADER_SIZE: Final = HEADER.size

# The protocol's limit for the data of one frame, in bytes.
MAX_DATA: Final = 4 * 1024 * 1024
MAX_STREAM_ID: Final = 0xFFFFFFFF

# Message types.
REQUEST: Final = 0x01
RESPONSE: Final = 0x02
DATA: Final = 0x03

# Flags. The first two of a request say which kind of stream it opens: neither is a unary call.
REMOTE_CLOSED: Final = 0x01  # request, data: the sender sends no more data
REMOTE_OPEN: Final = 0x02  # request: the sender will send data
NO_DATA: Final = 0x04  # data: the frame carries no message, not even an empty one

# Most frames are far smaller; one read then brings in many of them.
READ_BUFFER: Final = 64 * 1024


def too_large(length: int) -> RpcError:
    return RpcError(
        Code.RESOURCE_EXHAUSTED, f"message of {length} bytes is over the limit of {MAX_DATA} bytes"
    )


def frame(stream_id: int, kind: int, flags: int, data: bytes) -> bytes:
    """One frame, header and data together, so that it takes one write.

    Raises:
        RpcError: RESOURCE_EXHAUSTED, the data is over `MAX_DATA`.
    """
    if len(data) > MAX_DATA:
        raise too_large(len(data))
    return HEADER.pack(len(data), stream_id, kind, flags) + data


class FrameReader:
    """Cuts received bytes into frames.

    `on_frame(stream_id, type, flags, data)` is called for each whole frame, `on_oversized(stream_id, type,
    length)` as soon as the header of a frame over `MAX_DATA` is there; the data of that one is discarded
    as it arrives and never kept.

    Bytes are received in place: write up to `len(buffer())` bytes into `buffer()`, then call `received(count)`.
    Small frames are cut out of one buffer that is used again and again; the data of a large frame is received
    straight into an array of its own. So at most `buffer_size` + `MAX_DATA` bytes are held.

    After `pause()` no callback is made until `resume()`, even when whole frames are waiting in the buffer.
    """

    __slots__ = (
        "_buffer",
        "_data",
        "_data_filled",
        "_data_header",
        "_end",
        "_on_frame",
        "_on_oversized",
        "_paused",
        "_skip",
        "_start",
        "_view",
    )

    def __init__(
        self,
        on_frame: Callable[[int, int, int, bytearray], None],
        on_oversized: Callable[[int, int, int], None],
        *,
        buffer_size: int = READ_BUFFER,
    ) -> None:
        self._on_frame = on_frame
        self._on_oversized = on_oversized
        self._buffer = bytearray(max(buffer_size, 4 * HEADER_SIZE))
        self._view = memoryview(self._buffer)
        self._start = 0  # of the bytes that are received and not yet parsed
        self._end = 0
        self._skip = 0  # bytes of an oversized frame that are still to come
        self._data: bytearray | None = None  # of a large frame that is being received
        self._data_filled = 0
        self._data_header = (0, 0, 0)
        self._paused = False

    def buffer(self) -> memoryview:
        """Where the next received bytes go. Not empty unless a whole large frame waits for `resume()`."""
        if self._data is not None:
            return memoryview(self._data)[self._data_filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._buffer):
            waiting = self._end - self._start
            self._buffer[:waiting] = self._buffer[self._start :]
            self._start, self._end = 0, waiting
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """`count` bytes were written into `buffer()`: hand out the frames that are now whole."""
        if self._data is not None:
            self._data_filled += count
        else:
            self._end += count
        self._parse()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False
        self._parse()

    def _parse(self) -> None:
        while not self._paused:
            if self._data is not None:
                if self._data_filled < len(self._data):
                    return
                data, self._data = self._data, None
                self._on_frame(*self._data_header, data)
                continue
            if self._skip:
                skipped = min(self._skip, self._end - self._start)
                self._skip -= skipped
                self._start += skipped
            start = self._start
            if self._end - start < HEADER_SIZE:
                return
            length, stream_id, kind, flags = HEADER.unpack_from(self._buffer, start)
            start += HEADER_SIZE
            if length > MAX_DATA:
                self._start = start
                self._skip = length
                self._on_oversized(stream_id, kind, length)
                continue
            stop = start + length
            if stop > self._end:
                # A frame of up to a quarter of the buffer is waited for in the buffer, which has room for it.
                if length > len(self._buffer) // 4:
                    self._begin_data((stream_id, kind, flags), length, start)
                return
            self._start = stop
            self._on_frame(stream_id, kind, flags, self._buffer[start:stop])

    def _begin_data(self, header: tuple[int, int, int], length: int, start: int) -> None:
        have = self._end - start
        self._data = bytearray(length)
        self._data[:have] = self._buffer[start : self._end]
        self._data_header = header
        self._data_filled = have
        self._start = self._end = 0
