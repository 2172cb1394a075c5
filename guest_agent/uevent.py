"""Wake up when the kernel announces that hardware came or went."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_NETLINK_KOBJECT_UEVENT = 15
_KERNEL_GROUP = 1


class Uevents:
    """The kernel's announcements. The socket is opened by the first who waits."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._waiters: set[asyncio.Event] = set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when the condition holds; it is looked at now and after every announcement. Raises OSError."""
        if condition():  # most often it holds already, and listening costs more than a look
            return
        news = asyncio.Event()
        self._open()
        self._waiters.add(news)
        try:
            while not condition():
                news.clear()
                await news.wait()
        finally:
            self._waiters.discard(news)
            if not self._waiters:
                self.close()

    def _open(self) -> None:
        if self._socket is None:
            kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._socket = socket.socket(socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
            self._socket.bind((0, _KERNEL_GROUP))
            asyncio.get_running_loop().add_reader(self._socket, self._read)

    def close(self) -> None:
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None

    def _read(self) -> None:
        assert self._socket is not None
        try:
            while self._socket.recv(65536):
                pass
        except OSError:
            # EAGAIN: that was all. ENOBUFS: there were more than fit, which is news as well.
            pass
        for waiter in self._waiters:
            waiter.set()
