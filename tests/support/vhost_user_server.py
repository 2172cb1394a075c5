"""A vhost-user network server (QEMU: interop/vhost-user) that takes everything and moves no packets."""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_HEADER = struct.Struct("=III")
_GET_FEATURES, _GET_VRING_BASE, SET_VRING_KICK, _GET_PROTOCOL_FEATURES = 1, 11, 12, 15
_REPLY = 0x1 | 0x4
# VIRTIO_NET_F_MRG_RXBUF, VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_F_VERSION_1
_FEATURES = {
    _GET_FEATURES: 1 << 15 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 30 | 1 << 32,
    _GET_PROTOCOL_FEATURES: 0,
}
_MOST_FDS = 16


@contextmanager
def serving(path: Path) -> Iterator[list[int]]:
    """Such a server for one machine; yields the requests that it got."""
    seen: list[int] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=_serve, args=(listener, seen))
        thread.start()
        try:
            yield seen
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(listener: socket.socket, seen: list[int]) -> None:
    try:
        connection, _ = listener.accept()
    except OSError:
        return
    with connection:
        while True:
            head, fds, _, _ = socket.recv_fds(connection, _HEADER.size, _MOST_FDS)
            for fd in fds:
                os.close(fd)
            if len(head) < _HEADER.size:
                return
            request, _, size = _HEADER.unpack(head)
            body = connection.recv(size, socket.MSG_WAITALL) if size else b""
            seen.append(request)
            if request in _FEATURES:
                connection.sendall(_HEADER.pack(request, _REPLY, 8) + struct.pack("=Q", _FEATURES[request]))
            elif request == _GET_VRING_BASE:
                connection.sendall(
                    _HEADER.pack(request, _REPLY, 8) + struct.pack("=II", *struct.unpack("=II", body))
                )
