"""The host's ends of a process's streams: FIFOs, files, and the pipes to a logger.

Nothing here blocks the event loop. What a stream is called follows containerd's runc shim: a path without a scheme is
a FIFO, or a file that exists; `fifo://` is the same; `file://` is a file that is made with its folders and appended to;
`binary://` and `binary-v2://` are programs that take both outputs (`shim.logger`).
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import os
import re
import stat
import sys
import termios
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

import structlog

from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection

log = structlog.get_logger()

# What we ask the kernel to make room for between us and a reader: more bytes for each of our wake-ups, and of its.
# It is the default of /proc/sys/fs/pipe-max-size, which binds the unprivileged.
_PIPE_BYTES = 1 << 20
_STDIN_READ_BYTES = 64 * 1024
# A reader that has taken nothing for so long is none: clients read as fast as they can, or are gone.
_READER_IDLE_S = 0.3
_IN_ACCESS = 1  # linux/inotify.h
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


class Uri(NamedTuple):
    """A stream's name, taken apart. The scheme is empty for a plain path."""

    scheme: str
    path: str
    query: str = ""


def parse_uri(text: str, what: str, *, schemes: Collection[str]) -> Uri:
    """Take a stream's name apart; `what` says in messages which stream it is.

    Raises:
        InvalidRequest: the scheme is none of `schemes`, or the path is not absolute.
    """
    match = _SCHEME.match(text)
    uri = Uri("", text)
    if match:
        rest, _, query = text[match.end() :].partition("#")[0].partition("?")
        uri = Uri(match[1], unquote(rest), query)
        if uri.scheme not in schemes:
            known = ", ".join(f"{scheme}://" for scheme in schemes)
            raise InvalidRequest(
                f"{what} has the unknown scheme {uri.scheme}:// in {text}: use a fifo's path or {known}"
            )
    if not uri.path.startswith("/"):
        scheme = f"{uri.scheme}://" if uri.scheme else ""
        raise InvalidRequest(f"{what} is {text}, not an absolute path: use {scheme}/...")
    return uri


class Output:
    """Where stdout or stderr goes. `written` counts the bytes that the host has taken."""

    def __init__(self, what: str, writer: int, reader: int | None = None) -> None:
        """Takes over the descriptors: the one to write to, and a reading end to keep open, if any."""
        self.written = 0
        self._what = what
        self._writer: int | None = writer
        self._reader = reader

    @classmethod
    def open(cls, uri: Uri, what: str) -> Output:
        """A FIFO, with a reading end of our own so that nothing is lost while nobody else reads, or a file.

        Raises:
            InvalidRequest: the path cannot be opened.
        """
        reader: int | None = None
        try:
            # Only a file that is called one is made: a FIFO that is gone had a reader that is gone.
            create = os.O_CREAT if uri.scheme == "file" else 0
            if create:
                os.makedirs(os.path.dirname(uri.path), exist_ok=True)
            if _is_fifo(uri.path):
                reader = os.open(uri.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                enlarge(reader)
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_APPEND | create
            return cls(what, os.open(uri.path, flags, 0o644), reader)
        except (OSError, ValueError) as err:
            if reader is not None:
                os.close(reader)
            raise _cannot_open(what, uri.path, err) from err

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting for the reader as long as it takes."""
        view = memoryview(data)
        while view and self._writer is not None:
            try:
                written = os.write(self._writer, view)
            except BlockingIOError:
                await ready(self._writer, write=True)
                continue
            except OSError as err:
                # A full disk, or a logger that has ended. The process must not be blocked for ever: from now on its
                # output is thrown away.
                log.warning("output_lost", what=self._what, error=str(err))
                self.finish()
                break
            self.written += written
            view = view[written:]

    async def taken(self) -> None:
        """Wait until a FIFO's reader has taken all there is, as long as it goes on reading."""
        if self._reader is None or not _unread(self._reader):
            return
        try:
            watch = _watch_reads(self._reader)
        except OSError as err:
            log.debug("reads_not_watched", what=self._what, error=str(err))
            return
        try:
            while self._reader is not None and _unread(self._reader):
                async with asyncio.timeout(_READER_IDLE_S):
                    await ready(watch, write=False)
                os.read(watch, _STDIN_READ_BYTES)
        except TimeoutError:
            log.debug("output_not_read", what=self._what)
        finally:
            os.close(watch)

    def finish(self) -> None:
        """The stream has ended: readers see it after the last byte."""
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def release(self) -> None:
        """Let go of everything; bytes that nobody has read are gone."""
        self.finish()
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None


class Input:
    """Where stdin comes from: a FIFO, or anything else that can be read. Opened when the process starts: until then
    its writer waits, and so does its `CloseIO`, which a client can only send once it has been given the process."""

    def __init__(self, uri: Uri, what: str) -> None:
        self._path = uri.path
        self._what = what
        self._reader: int | None = None
        self._keeper: int | None = None
        self._ended_early = False

    def open(self) -> None:
        """Open the reading end, and the writing end that keeps it from ending by itself.

        Raises:
            InvalidRequest: the path cannot be opened.
        """
        try:
            self._reader = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if _is_fifo(self._path) and not self._ended_early:
                self._keeper = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, ValueError) as err:
            self.release()
            raise _cannot_open(self._what, self._path, err) from err

    async def read(self) -> bytes:
        """The next bytes; empty when all writers have closed and ours has been given up."""
        while self._reader is not None:
            try:
                return os.read(self._reader, _STDIN_READ_BYTES)
            except BlockingIOError:
                await ready(self._reader, write=False)
            except OSError as err:  # a folder, say
                log.warning("input_lost", what=self._what, error=str(err))
                break
        return b""

    def give_up_keeper(self) -> None:
        """`CloseIO`: from now on the client alone decides when the stream ends."""
        self._ended_early = True
        if self._keeper is not None:
            os.close(self._keeper)
            self._keeper = None

    def release(self) -> None:
        """Let go of everything."""
        self.give_up_keeper()
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None


def enlarge(pipe: int) -> None:
    """Give a pipe more room, if the kernel lets us: what it has is enough to work."""
    try:
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError as err:
        log.debug("pipe_not_enlarged", error=str(err))


def _unread(pipe: int) -> int:
    """Bytes in the pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def _watch_reads(fifo: int) -> int:
    """An inotify descriptor that becomes readable when anybody has read from the FIFO, see inotify(7).

    Raises:
        OSError: the kernel has no more of them to give.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if watch < 0:
        raise OSError(ctypes.get_errno(), "inotify_init1")
    # The name may be gone, or another's, by now; the descriptor's is not.
    if libc.inotify_add_watch(watch, b"/proc/self/fd/%d" % fifo, _IN_ACCESS) < 0:
        number = ctypes.get_errno()
        os.close(watch)
        raise OSError(number, "inotify_add_watch")
    return int(watch)


async def ready(fd: int, *, write: bool) -> None:
    """Wait until `fd` can be written or read without blocking."""
    loop = asyncio.get_running_loop()
    event: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, _set, event)
    try:
        await event
    finally:
        remove(fd)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _cannot_open(what: str, path: str, err: OSError | ValueError) -> InvalidRequest:
    why = err.strerror if isinstance(err, OSError) else err
    return InvalidRequest(f"cannot open {what} {path}: {why}")
