"""The kernel's vhost-vsock: streams are ordinary AF_VSOCK sockets, the device is an open /dev/vhost-vsock.

The host's ports are one space for all guests, so who listens picks a port that is free, and what another
guest connects to it is turned away here.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import socket
import struct
from typing import TYPE_CHECKING

import structlog

from hypervisor.errors import HostUnsupported
from hypervisor.vsock.base import FIRST_GUEST_CID

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor.vsock.base import OnConnection

log = structlog.get_logger(__name__)

_DEVICE = "/dev/vhost-vsock"
# <linux/vhost.h>: _IOW(VHOST_VIRTIO = 0xAF, 0x60, __u64)
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60
# 2**32 - 1 means "any address".
_LAST_GUEST_CID = 2**32 - 2
_CID_ATTEMPTS = 50
# <linux/vm_sockets.h>; takes a struct timeval.
_SO_VM_SOCKETS_CONNECT_TIMEOUT = 6
# The kernel's own limit is 2 s, less than an emulated guest needs to load its driver. The caller sets a
# limit.
_CONNECT_LIMIT_S = 24 * 60 * 60
_BACKLOG = 16


def open_device(
    set_cid: Callable[[int, int], None] | None = None, *, device: str = _DEVICE
) -> tuple[int, int]:
    """Open a vhost-vsock device with an address nobody else has; returns its descriptor and the address.

    Raises HostUnsupported when there is no such device here or no address is free.
    """
    try:
        fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        raise HostUnsupported(
            f'{device}: {err.strerror}; load the kernel module vhost_vsock or set vsock = "user"'
        ) from err
    try:
        return fd, _claim_cid(fd, set_cid or _set_guest_cid)
    except BaseException:
        os.close(fd)
        raise


def _claim_cid(fd: int, set_cid: Callable[[int, int], None]) -> int:
    for _ in range(_CID_ATTEMPTS):
        cid = FIRST_GUEST_CID + secrets.randbelow(_LAST_GUEST_CID - FIRST_GUEST_CID + 1)
        try:
            set_cid(fd, cid)
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                raise HostUnsupported(f"{_DEVICE} refuses a guest address: {err.strerror}") from err
        else:
            return cid
    raise HostUnsupported(f"{_DEVICE}: no free guest address in {_CID_ATTEMPTS} attempts")


def _set_guest_cid(fd: int, cid: int) -> None:
    fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))


def _stream() -> socket.socket:
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.setblocking(False)
    limit = struct.pack("@ll", _CONNECT_LIMIT_S, 0)
    # To a socket of this family Python's setsockopt() passes a number and nothing else.
    same = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=sock.fileno())
    try:
        same.setsockopt(socket.AF_VSOCK, _SO_VM_SOCKETS_CONNECT_TIMEOUT, limit)
    finally:
        same.detach()
    return sock


class VhostVsock:
    """`Vsock` over the kernel's transport. The descriptor of the device belongs to the caller."""

    def __init__(self, guest_cid: int) -> None:
        self.guest_cid = guest_cid
        self._closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._listeners: list[socket.socket] = []

    async def connect(self, port: int) -> socket.socket:
        """See `Vsock.connect`."""
        sock = _stream()
        try:
            await self._connect(sock, (self.guest_cid, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def listen(self, port: int, on_connection: OnConnection) -> None:
        """See `Vsock.listen`."""
        sock = _stream()
        try:
            sock.bind((socket.VMADDR_CID_ANY, port))
            sock.listen(_BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._listeners.append(sock)
        asyncio.get_running_loop().add_reader(sock, self._accept, sock, on_connection)

    async def aclose(self) -> None:
        """See `Vsock.aclose`."""
        if not self._closed.done():
            self._closed.set_result(None)
        while self._listeners:
            sock = self._listeners.pop()
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()

    async def _connect(self, sock: socket.socket, address: tuple[int, int]) -> None:
        connecting = asyncio.ensure_future(asyncio.get_running_loop().sock_connect(sock, address))
        try:
            await asyncio.wait([connecting, self._closed], return_when=asyncio.FIRST_COMPLETED)
            if self._closed.done():
                raise ConnectionResetError("the machine is gone")
            await connecting
        except ConnectionResetError as err:
            if self._closed.done():
                raise
            # That is how the kernel reports the guest's "nobody listens".
            raise ConnectionRefusedError(f"nobody listens on vsock port {address[1]} of the guest") from err
        finally:
            connecting.cancel()
            await asyncio.wait([connecting])

    def _accept(self, listener: socket.socket, on_connection: OnConnection) -> None:
        try:
            sock, (cid, port) = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        if cid != self.guest_cid:
            log.info("vsock_stranger_refused", cid=cid, port=port)
            sock.close()
            return
        sock.setblocking(False)
        on_connection(sock)
