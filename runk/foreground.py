"""A container's process in the foreground: its terminal, its signals, its exit status."""

from __future__ import annotations

import array
import fcntl
import os
import select
import signal
import socket
import struct
import tempfile
import termios
import tty
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from oci_engine.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_CHUNK = 1 << 16
#: Not passed on: they cannot be caught, or are about this process itself.
_OWN_SIGNALS = frozenset(
    {
        signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGURG, signal.SIGWINCH,
        signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE,
    }
)  # fmt: skip


class ConsoleSocket:
    """Where the process's terminal is sent to."""

    def __init__(self, stack: ExitStack) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="runk-"))
        self.path = f"{folder}/console.sock"
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(self.path)
        self._listener.listen(1)

    def terminal(self) -> int:
        """The master end, once the process has been made."""
        connection, _ = self._listener.accept()
        with connection:
            files = array.array("i")
            _, ancillary, _, _ = connection.recvmsg(
                _CHUNK, socket.CMSG_SPACE(files.itemsize), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, data in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    files.frombytes(data[: files.itemsize])
                    return files[0]
        raise EngineError("the container's terminal was not sent")


@contextmanager
def forwarded_signals(pid: int) -> Iterator[None]:
    """What this process is told is passed on to the container's, which is a child that nobody else reaps."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {}
    for number in signal.valid_signals() - _OWN_SIGNALS:
        with suppress(OSError, ValueError):
            before[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_size() -> tuple[int, int]:
    """Rows and columns of the terminal that this program was called from; zeros when it was not."""
    try:
        rows, columns = struct.unpack("4H", fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))[:2]
    except OSError:
        return (0, 0)
    return rows, columns


def set_size(master: int, size: tuple[int, int]) -> None:
    with suppress(OSError):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))


def wait(pid: int, master: int = -1) -> int:
    """Returns the exit status as shells have it, when the process has ended and its output has been copied."""
    with forwarded_signals(pid):
        if master >= 0:
            with _raw_input(), _same_size(master):
                _copy(master)
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _copy(master: int) -> None:
    """Between our streams and the terminal, until nobody has its other end open any more."""
    poll = select.poll()
    poll.register(master, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            try:
                data = os.read(fd, _CHUNK)
            except OSError:  # EIO: the last one has closed the terminal
                data = b""
            if not data and fd == master:
                return
            if not data:
                poll.unregister(0)
            else:
                _write(1 if fd == master else master, data)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextmanager
def _raw_input() -> Iterator[None]:
    """Keys reach the container as they are, Ctrl-C included."""
    if not os.isatty(0):
        yield
        return
    before = termios.tcgetattr(0)
    tty.setraw(0, termios.TCSADRAIN)  # what was typed already is for the container
    try:
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


@contextmanager
def _same_size(master: int) -> Iterator[None]:
    """The container's terminal is as large as ours, also after a change."""

    def resize(_number: int = 0, _frame: FrameType | None = None) -> None:
        set_size(master, own_size())

    if not os.isatty(0):
        yield
        return
    resize()
    before = signal.signal(signal.SIGWINCH, resize)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
