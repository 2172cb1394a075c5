"""A container's process in the foreground: its terminal, its signals, its exit status."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import termios

from oci_engine.c_modules import signal
from oci_engine.errors import EngineError
from oci_engine.undo import Undo, suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
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

    def __init__(self, undo: Undo) -> None:
        import socket
        import tempfile

        folder = tempfile.mkdtemp(prefix="runk-")
        undo.callback(os.rmdir, folder)
        self.path = f"{folder}/console.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        undo.callback(self._listener.close)
        self._listener.bind(self.path)
        undo.callback(os.unlink, self.path)
        self._listener.listen(1)

    def terminal(self) -> int:
        """The master end, once the process has been made."""
        import array
        import socket

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


def _forward_signals(pid: int, undo: Undo) -> None:
    """What this process is told is passed on to the container's, which is a child that nobody else reaps."""

    def forward(number: int, _frame: FrameType | None) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in signal.valid_signals() - _OWN_SIGNALS:
        with suppress(OSError, ValueError):
            undo.callback(signal.signal, number, signal.signal(number, forward))


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
    with Undo() as undo:
        _forward_signals(pid, undo)
        if master >= 0:
            with Undo() as terminal:
                if os.isatty(0):
                    _take_raw_input(terminal)
                    _keep_same_size(master, terminal)
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


def _take_raw_input(undo: Undo) -> None:
    """Keys reach the container as they are, Ctrl-C included."""
    import tty

    undo.callback(termios.tcsetattr, 0, termios.TCSADRAIN, termios.tcgetattr(0))
    tty.setraw(0, termios.TCSADRAIN)  # what was typed already is for the container


def _keep_same_size(master: int, undo: Undo) -> None:
    """The container's terminal is as large as ours, also after a change."""

    def resize(_number: int = 0, _frame: FrameType | None = None) -> None:
        set_size(master, own_size())

    resize()
    undo.callback(signal.signal, signal.SIGWINCH, signal.signal(signal.SIGWINCH, resize))
