"""A terminal for `ctr --tty`: a pseudo terminal that tests read until some text has appeared."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType


class Terminal:
    """A program on a pseudo terminal of its own, ended with the block."""

    def __init__(self, argv: Sequence[str], *, rows: int, columns: int) -> None:
        self._master, slave = pty.openpty()
        self.resize(rows, columns)
        self.seen = ""
        self.process = subprocess.Popen(
            argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, close_fds=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def resize(self, rows: int, columns: int) -> None:
        """Change the window; the kernel tells the program by SIGWINCH."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """What a person would type."""
        os.write(self._master, text.encode())

    def read_until(self, pattern: str, timeout_s: float = 60.0) -> str:
        """Everything up to a match of the pattern. Fails with what was seen instead."""
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.seen):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._master], [], [], left)[0]:
                raise AssertionError(f"no {pattern!r} within {timeout_s} s in {self.seen!r}")
            try:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
            except OSError as err:  # the other side is closed
                raise AssertionError(f"no {pattern!r} before the end of {self.seen!r}") from err
        seen, self.seen = self.seen, ""
        return seen
