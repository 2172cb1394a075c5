# mypy: ignore-errors
"""Sockets with plain numbers for families and types."""

import _socket
import os
from _socket import *  # noqa: F403

error = OSError
has_ipv6 = True


class socket(_socket.socket):
    """`_socket.socket` with accept, context manager and detach-safe close."""

    __slots__ = ("__weakref__",)

    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        if fileno is None:
            family = _socket.AF_INET if family == -1 else family
            type = _socket.SOCK_STREAM if type == -1 else type
            proto = 0 if proto == -1 else proto
        _socket.socket.__init__(self, family, type, proto, fileno)

    def accept(self):
        descriptor, address = self._accept()
        return socket(self.family, self.type, self.proto, fileno=descriptor), address

    def dup(self):
        return socket(self.family, self.type, self.proto, fileno=_socket.dup(self.fileno()))

    def get_inheritable(self):
        return os.get_inheritable(self.fileno())

    def set_inheritable(self, inheritable):
        os.set_inheritable(self.fileno(), inheritable)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __repr__(self):
        return f"<socket fd={self.fileno()} family={self.family} type={self.type}>"


def socketpair(family=_socket.AF_UNIX, type=_socket.SOCK_STREAM, proto=0):
    first, second = _socket.socketpair(family, type, proto)
    return socket(family, type, proto, first.detach()), socket(family, type, proto, second.detach())
