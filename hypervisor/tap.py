"""Taps: network interfaces of the host whose other end is a descriptor, here QEMU's (kernel: networking/tuntap).

A tap made here lasts as long as a descriptor of it is open. When QEMU ends, however it ends, the tap goes with it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

from hypervisor.errors import SHORTAGES, HostUnsupported

if TYPE_CHECKING:
    from contextlib import ExitStack

_TUN = "/dev/net/tun"
_VHOST_NET = "/dev/vhost-net"
# <linux/if_tun.h>
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_IFREQ = struct.Struct("16sH22x")
#: The kernel's limit of an interface's name, without its zero byte.
NAME_BYTES = 15


def open_tap(name: str, queues: int, undo: ExitStack) -> tuple[int, ...]:
    """Make a tap in the current network namespace, with a descriptor for each queue; `undo` closes them.

    Raises HostUnsupported; OSError when the host is short of something.
    """
    fds = []
    for _ in range(queues):
        fd = _opened(_TUN, "load the kernel module tun")
        undo.callback(os.close, fd)
        try:
            set_up(fd, name, queues)
        except OSError as err:
            why = "the name is taken" if err.errno == errno.EBUSY else err.strerror
            raise HostUnsupported(f"cannot make the tap {name}: {why}") from err
        fds.append(fd)
    return tuple(fds)


def set_up(fd: int, name: str, queues: int) -> None:
    """Make a descriptor one of the tap's, in the way that QEMU wants it: with virtio's header. Raises OSError."""
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))


def open_vhost_net(queues: int, undo: ExitStack) -> tuple[int, ...]:
    """A descriptor for each queue of the kernel's own packet handling; none on a host that does not have it."""
    if not os.access(_VHOST_NET, os.R_OK | os.W_OK):
        return ()
    fds = []
    for _ in range(queues):
        try:
            fd = _opened(_VHOST_NET, "")
        except HostUnsupported:  # the device is there, its module is not
            return ()
        undo.callback(os.close, fd)
        fds.append(fd)
    return tuple(fds)


def _opened(path: str, remedy: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        if err.errno in SHORTAGES:
            raise
        raise HostUnsupported(f"cannot open {path}: {err.strerror}; {remedy}") from err
