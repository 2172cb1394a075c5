"""The guest's serial console: read all the time, kept in small amounts.

What the guest writes is untrusted and endless. The last lines stay in memory (`hypervisor.tail`), the last
bytes in two files, `console.log` and `console.log.1`, that together never exceed `LOG_BYTES`. None of it goes
to our own log, not even at debug level: a guest must not be able to fill the host's disk.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import structlog

from hypervisor.tail import LineTail

if TYPE_CHECKING:
    import socket
    from pathlib import Path

log = structlog.get_logger(__name__)

LOG_BYTES = 1 << 20
# The first line of a panic says most, and up to a hundred of registers and stacks follow it.
TAIL_LINES = 200
_READ_BYTES = 16384


class Console:
    """Reads `sock` on the event loop until the other side closes or `close()` is called. Owns the socket."""

    def __init__(self, sock: socket.socket, log_path: Path, *, log_bytes: int = LOG_BYTES) -> None:
        self.log_path = log_path
        self._sock = sock
        self._log = _RotatingFile(log_path, log_bytes // 2)
        self._tail = LineTail(max_lines=TAIL_LINES)
        self.last_read_at = asyncio.get_running_loop().time()
        """Loop time of the last bytes; until there were any, of the beginning."""
        sock.setblocking(False)
        asyncio.get_running_loop().add_reader(sock, self._read)

    def tail(self) -> list[str]:
        """The last lines, oldest first, as printable text."""
        return self._tail.lines()

    def drain(self) -> None:
        """Take what is already there: the last words of a guest whose machine is gone."""
        while self._read():
            pass

    @property
    def closed(self) -> bool:
        """Whether the other side is gone or `close()` was called."""
        return self._sock.fileno() < 0

    def close(self) -> None:
        """Stop reading. Repeating it is harmless."""
        if not self.closed:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._log.close()

    def _read(self) -> bool:
        if self.closed:
            return False
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # the peer died with unread bytes
            data = b""
        if not data:
            self.close()
            return False
        self.last_read_at = asyncio.get_running_loop().time()
        self._tail.feed(data)
        self._log.write(data)
        return True


class _RotatingFile:
    """A file and its predecessor, each at most `limit` bytes. A full disk stops the log, nothing else."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._size = 0
        self._fd: int | None = self._create()

    def write(self, data: bytes) -> None:
        if self._fd is None:
            return
        try:
            if self._size + len(data) > self._limit:
                os.close(self._fd)
                self._fd = None
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._fd = self._create()
            self._size += os.write(self._fd, data)
        except OSError as err:
            log.warning("console_log_stopped", path=str(self._path), error=str(err))
            self.close()

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _create(self) -> int:
        self._size = 0
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
