"""Unix sockets for the programs we start: bound here and handed over as file descriptors.

Who gets a listening descriptor need not create a path, and who connects need not wait for one to appear:
connecting succeeds as soon as we listen, the peer accepts when it is ready.
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Attempts of a handshake that the peer has not looked at yet wait here.
_BACKLOG = 64


def unix_listener(path: Path) -> socket.socket:
    """A listening socket at `path`, mode 0600. Its folder must not be open to others. Raises OSError.

    What a run that crashed left under that name is replaced.
    """
    sock = socket.socket(socket.AF_UNIX)
    try:
        path.unlink(missing_ok=True)
        with _short(path) as short:
            sock.bind(short)
        path.chmod(0o600)
        sock.listen(_BACKLOG)
    except OSError as err:
        sock.close()
        raise OSError(err.errno, f"cannot listen: {err.strerror}", str(path)) from err
    return sock


def unix_connection(path: Path) -> socket.socket:
    """A non-blocking socket connected to `path`. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        with _short(path) as short:
            sock.connect(short)  # Unix sockets connect at once or fail
    except BaseException:
        sock.close()
        raise
    return sock


def listener_and_connection(path: Path) -> tuple[socket.socket, socket.socket]:
    """A listener with one connection already waiting in it; `path` is gone on return, so nobody else
    connects.
    """
    listener = unix_listener(path)
    try:
        return listener, unix_connection(path)
    except BaseException:
        listener.close()
        raise
    finally:
        path.unlink()


@contextmanager
def _short(path: Path) -> Iterator[str]:
    """The same file under a name that fits into a socket address (108 bytes), however deep its folder is."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
