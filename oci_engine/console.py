"""The terminal of a container's process: made inside the container, its master end sent out over a socket."""

from __future__ import annotations

import _socket
import fcntl
import os
import stat
import struct

from oci_engine import inroot, linux
from oci_engine.errors import SetupFailed
from oci_engine.steps import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.plan import ProcessPlan

_TIOCGPTPEER = 0x5441  # asm-generic/ioctls.h
_TIOCSPTLCK = 0x40045431


def open_terminal(root: int, process: ProcessPlan, console_socket: int) -> int:
    """Makes a terminal of the container's own devpts, sends its master end away, returns the other one."""
    with step("terminal"):
        master = inroot.open_path(root, "dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
        details = os.fstat(master)
        genuine = linux.fs_type(master) == linux.DEVPTS_SUPER_MAGIC and stat.S_ISCHR(details.st_mode)
        if not genuine or details.st_rdev != os.makedev(5, 2):
            raise SetupFailed("terminal: the container's /dev/pts/ptmx is not that of a devpts mount")
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        # Not by its path in the container, which could be anything by now.
        peer = fcntl.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        os.fchown(peer, process.uid, -1)
        if process.console_size is not None:
            fcntl.ioctl(master, linux.TIOCSWINSZ, struct.pack("4H", *process.console_size, 0, 0))
        _send(console_socket, master)
        os.close(master)
        return peer


def _send(console_socket: int, master: int) -> None:
    """As other runtimes do: the file descriptor goes with its name."""
    connection = _socket.socket(fileno=os.dup(console_socket))
    try:
        connection.sendmsg(
            [b"/dev/pts/ptmx"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack("i", master))]
        )
    finally:
        connection.close()


def show_as_console(root: int, peer: int) -> None:
    """Mount the terminal at /dev/console."""
    with step("terminal: /dev/console"):
        target = inroot.make_file(root, "dev/console")
        tree = linux.open_tree(peer, "", linux.AT_EMPTY_PATH | linux.OPEN_TREE_CLONE)
        linux.move_mount(tree, target)
        os.close(tree)
        os.close(target)


def take_terminal(peer: int) -> None:
    """Make it the standard streams and the controlling terminal of this process, which leads a session."""
    with step("terminal"):
        fcntl.ioctl(peer, linux.TIOCSCTTY, 0)
        for number in (0, 1, 2):
            os.dup2(peer, number)
        if peer > 2:
            os.close(peer)
