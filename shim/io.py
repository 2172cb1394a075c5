"""A process's stdio: between containerd's FIFOs on the host and the streams that the guest's agent offers.

Nothing here blocks the event loop, loses a byte, or lets one stream wait for another:

- The shim keeps a read end of every output FIFO open until the process is deleted, so that what a short process wrote
  is still there for a reader that comes late, or comes back after containerd's restart. The write end is closed at the
  end of the stream: that is how readers learn of it.
- The shim keeps a write end of the stdin FIFO open, so that the end of the stream comes when containerd says
  `CloseIO` and its client has closed too, not when no client happens to be connected.
"""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING, NamedTuple, Protocol
from urllib.parse import urlsplit

import structlog

from shim.errors import InvalidRequest
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

log = structlog.get_logger()

# One pipe buffer: more per call saves round trips only when the guest's pipe is larger too.
READ_SIZE = 256 * 1024
_STDIN_READ_SIZE = 64 * 1024
# How long deleting a process waits for output that does not move: the process is gone, and whoever holds the other end
# of its pipe, or should read our FIFO, does nothing. runc's shim waits as long.
_IDLE_LIMIT_S = 2.0
# How long it waits for output that does move. What the process itself has left fits into a pipe; a child of it that
# lives on may write for ever.
_DRAIN_LIMIT_S = 10.0


class Stdio(NamedTuple):
    """Where a process's streams are on the host, as containerd names them; empty means none."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class GuestStreams(Protocol):
    """The other side: the process's streams in the guest. Empty bytes are the end of a stream."""

    async def read_stdout(self, size: int) -> bytes: ...
    async def read_stderr(self, size: int) -> bytes: ...
    async def write_stdin(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...


class Output:
    """The host's end of stdout or stderr: a FIFO, or a file that is appended to."""

    def __init__(self, uri: str, what: str) -> None:
        path = _path_of(uri, what, schemes=("", "fifo", "file"))
        self._what = what
        self._reader: int | None = None
        self._writer: int | None = None
        self.written = 0
        """Bytes that the host has taken."""
        # Only a file that is called one is made: a FIFO that is gone had a reader that is gone.
        create = os.O_CREAT if uri.startswith("file:") else 0
        try:
            if _is_fifo(path):
                self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._writer = os.open(
                path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_APPEND | create, 0o600
            )
        except OSError as err:
            self.release()
            raise InvalidRequest(f"cannot open {what} {path}: {err.strerror}") from err

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting for the reader as long as it takes."""
        view = memoryview(data)
        while view and self._writer is not None:
            try:
                written = os.write(self._writer, view)
            except BlockingIOError:
                await _ready(self._writer, write=True)
                continue
            except OSError as err:
                # A full disk, say. The process must not be blocked for ever: from now on its output is thrown away.
                log.warning("output_lost", what=self._what, error=str(err))
                self.finish()
                break
            self.written += written
            view = view[written:]

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
    """The host's end of stdin, a FIFO. Opened when the process starts: until then its writer waits, and so does its
    `CloseIO`, which a client can only send once it has been given the process."""

    def __init__(self, uri: str, what: str) -> None:
        self._path = _path_of(uri, what, schemes=("", "fifo"))
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
        except OSError as err:
            self.release()
            raise InvalidRequest(f"cannot open {self._what} {self._path}: {err.strerror}") from err

    async def read(self) -> bytes:
        """The next bytes; empty when all writers have closed and ours has been given up."""
        while self._reader is not None:
            try:
                return os.read(self._reader, _STDIN_READ_SIZE)
            except BlockingIOError:
                await _ready(self._reader, write=False)
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


class ProcessIO:
    """All streams of one process and the tasks that copy them."""

    def __init__(self, stdio: Stdio, what: str) -> None:
        """Open the host's ends of the output.

        Raises:
            InvalidRequest: a path cannot be opened or its scheme is unknown; nothing stays open.
        """
        self._stdin: Input | None = None
        self._outputs: list[tuple[str, Output]] = []
        self._copies: list[asyncio.Task[None]] = []
        self._stdin_copy: asyncio.Task[None] | None = None
        self._what = what
        try:
            self._stdin = Input(stdio.stdin, f"stdin of {what}") if stdio.stdin else None
            # A terminal has one stream for both; containerd passes no stderr then, and none is used if it does.
            for name, uri in (("stdout", stdio.stdout), ("stderr", "" if stdio.terminal else stdio.stderr)):
                if uri:
                    self._outputs.append((name, Output(uri, f"{name} of {what}")))
        except InvalidRequest:
            self._release()
            raise

    def open_stdin(self) -> None:
        """Let the client's input come; the process is about to start.

        Raises:
            InvalidRequest: its path cannot be opened.
        """
        if self._stdin is not None:
            self._stdin.open()

    def start(self, guest: GuestStreams) -> None:
        """Begin copying; the process must exist in the guest."""
        for name, output in self._outputs:
            read = guest.read_stdout if name == "stdout" else guest.read_stderr
            self._copies.append(_spawn(self._copy_out(read, output), f"{name} of {self._what}"))
        if self._stdin is not None:
            self._stdin_copy = _spawn(self._copy_in(self._stdin, guest), f"stdin of {self._what}")

    def close_stdin(self) -> None:
        """What `CloseIO` asks for. Harmless without stdin."""
        if self._stdin is not None:
            self._stdin.give_up_keeper()

    def stop_stdin(self) -> None:
        """The process has exited and reads no more."""
        if self._stdin_copy is not None:
            self._stdin_copy.cancel()

    async def aclose(self) -> None:
        """Wait for the output still under way, as long as it moves within reason, then let go of everything."""
        pending = set(self._copies)
        deadline = asyncio.get_running_loop().time() + _DRAIN_LIMIT_S
        while pending:
            before = self._written
            _, pending = await asyncio.wait(pending, timeout=_IDLE_LIMIT_S)
            idle = self._written == before
            if pending and (idle or asyncio.get_running_loop().time() > deadline):
                reason = "nothing moved" if idle else "it does not end"
                log.info("output_abandoned", what=self._what, reason=reason)
                break
        tasks = [*pending, *([self._stdin_copy] if self._stdin_copy else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._release()

    def abort(self) -> None:
        """Let go of everything at once: the guest is gone, or the process never came to be."""
        for task in (*self._copies, *([self._stdin_copy] if self._stdin_copy else [])):
            task.cancel()
        self._release()

    @property
    def _written(self) -> int:
        return sum(output.written for _, output in self._outputs)

    def _release(self) -> None:
        if self._stdin is not None:
            self._stdin.release()
        for _, output in self._outputs:
            output.release()

    async def _copy_out(self, read: Callable[[int], Awaitable[bytes]], output: Output) -> None:
        try:
            while data := await _read_or_end(read):
                await output.write(data)
        finally:
            output.finish()

    async def _copy_in(self, stdin: Input, guest: GuestStreams) -> None:
        try:
            while data := await stdin.read():
                await guest.write_stdin(data)
            await guest.close_stdin()
        except RpcError as err:
            # The process closed its end or exited: what was meant for it has no reader any more.
            log.debug("stdin_ended", what=self._what, error=str(err))


async def _read_or_end(read: Callable[[int], Awaitable[bytes]]) -> bytes:
    """Agents of Kata before 4.1 answer the end of a stream with an error instead of no data."""
    try:
        return await read(READ_SIZE)
    except RpcError as err:
        log.debug("output_ended", error=str(err))
        return b""


def _spawn(copy: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
    return asyncio.create_task(copy, name=name)


def _path_of(uri: str, what: str, *, schemes: tuple[str, ...]) -> str:
    parts = urlsplit(uri)
    if parts.scheme not in schemes:
        known = ", ".join(f"{scheme}://" for scheme in schemes if scheme)
        raise InvalidRequest(
            f"{what} has the unknown scheme {parts.scheme}:// in {uri}: use a fifo's path or {known}"
        )
    return parts.path if parts.scheme else uri


def _is_fifo(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _ready(fd: int, *, write: bool) -> None:
    """Wait until `fd` can be written or read without blocking."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(fd, _set, ready)
    try:
        await ready
    finally:
        remove(fd)
