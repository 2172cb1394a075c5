"""A process's standard streams as the host reads and writes them: pipes, or one terminal.

Descriptors are ours, non-blocking, and closed as soon as nothing can come through them any more.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

from guest_agent.errors import StateConflict

if TYPE_CHECKING:
    from collections.abc import Callable

#: The most one read returns, whatever was asked for: it has to fit in a ttrpc frame with room to spare.
MAX_READ = 1024 * 1024
DEFAULT_READ = 64 * 1024
#: A pipe-full is what one call of the host takes: the kernel's 64 KiB would mean four times as many calls.
PIPE_BYTES = 256 * 1024
_F_SETPIPE_SZ = 1031
_TIOCSWINSZ = 0x5414


class _Stream:
    """A descriptor and the one waiter for its readiness."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def close(self) -> None:
        """Give up the descriptor; whoever waits for it wakes up."""
        if self._fd >= 0:
            self._forget()
            os.close(self._fd)
            self._fd = -1
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _forget(self) -> None:
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)

    async def _ready(self, add: Callable[..., object]) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiter = waiter
        add(self._fd, _resolve, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if self._fd >= 0:
                self._forget()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class Output(_Stream):
    """What a process writes. Several readers take turns."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._begun = False

    @property
    def owed(self) -> bool:
        """Whether somebody has begun to read, and has not come to the end."""
        return self._begun and not self.closed

    async def read(self, size: int) -> bytes:
        """Wait for output and return up to `size` bytes of it, at most MAX_READ; empty at the end.

        The end is when every process that had the other side closed it, which may be long after the first of
        them exited, or when the stream is closed here.
        """
        self._begun = True
        size = min(size or DEFAULT_READ, MAX_READ)
        async with self._turn:
            while self._fd >= 0:
                try:
                    data = os.read(self._fd, size)
                except BlockingIOError:
                    await self._ready(self._loop.add_reader)
                    continue
                except OSError as err:
                    if err.errno != errno.EIO:  # a terminal whose last user is gone
                        raise
                    data = b""
                if not data:
                    self.close()
                return data
            return b""


class Input(_Stream):
    """What a process reads. Several writers take turns, so that their data does not mix."""

    async def write(self, data: bytes) -> int:
        """Write all of it, waiting for the process to make room. Returns the number of bytes.

        Raises StateConflict when the process, or somebody else, closed the stream.
        """
        view = memoryview(data)
        async with self._turn:
            while view:
                if self._fd < 0:
                    raise StateConflict("stdin is closed")
                try:
                    view = view[os.write(self._fd, view) :]
                except BlockingIOError:
                    await self._ready(self._loop.add_writer)
                except OSError as err:
                    if err.errno not in (errno.EPIPE, errno.EIO):
                        raise
                    self.close()
                    raise StateConflict("the process has closed its stdin") from err
        return len(data)


class ChildStreams:
    """The ends of the pipes that are for the process. A context manager: they are closed here afterwards."""

    def __init__(self, fds: tuple[int, int, int]) -> None:
        self.fds = fds

    def __enter__(self) -> ChildStreams:
        return self

    def __exit__(self, *exception: object) -> None:
        for fd in self.fds:
            os.close(fd)


class Stdio:
    """The three streams of one process. With a terminal, stdin and stdout are the terminal and stderr is none."""

    def __init__(
        self, stdin: Input | None, stdout: Output | None, stderr: Output | None, terminal: int = -1
    ) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._terminal = terminal

    @classmethod
    def pipes(cls, size: int = 0) -> tuple[Stdio, ChildStreams]:
        """Three pipes. `size` in bytes is asked of the kernel for each; 0 is our default, PIPE_BYTES."""
        ours, theirs = [], []
        for child_reads in (True, False, False):
            reading, writing = os.pipe2(os.O_CLOEXEC)
            ours.append(writing if child_reads else reading)
            theirs.append(reading if child_reads else writing)
            fcntl.fcntl(reading, _F_SETPIPE_SZ, size or PIPE_BYTES)
        stdio = cls(Input(ours[0]), Output(ours[1]), Output(ours[2]))
        return stdio, ChildStreams((theirs[0], theirs[1], theirs[2]))

    @classmethod
    def terminal(cls, fd: int) -> Stdio:
        """A terminal by its controlling side."""
        return cls(Input(os.dup(fd)), Output(os.dup(fd)), None, fd)

    @property
    def owed(self) -> bool:
        """Whether the host is still to get some of the output."""
        return any(stream is not None and stream.owed for stream in (self.stdout, self.stderr))

    def close_stdin(self) -> None:
        """The process reads the end of its input. On a terminal that is a character to type, so nothing happens."""
        if self.stdin is not None and self._terminal < 0:
            self.stdin.close()

    def resize(self, rows: int, columns: int) -> None:
        """Raises StateConflict when there is no terminal."""
        if self._terminal < 0:
            raise StateConflict("the process has no terminal")
        fcntl.ioctl(self._terminal, _TIOCSWINSZ, struct.pack("HHHH", rows & 0xFFFF, columns & 0xFFFF, 0, 0))

    def close(self) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                stream.close()
        if self._terminal >= 0:
            os.close(self._terminal)
            self._terminal = -1
