"""Macvtaps: taps that are made on an interface of the host and take over all of its traffic.

Unlike other taps they are made by netlink, last until they are removed, and are opened through a device file of their
own. Which number that has, only the network namespace's sysfs tells; and a file for it under that number is made in a
file system that nobody else sees, since /dev has one namespace's alone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from hypervisor.errors import SHORTAGES, HostUnsupported
from hypervisor.tap import set_up
from netlink.rtnl import Rtnetlink

if TYPE_CHECKING:
    from collections.abc import Iterator

    from netlink.objects import Link

# System calls that have the same numbers everywhere, and <linux/mount.h>.
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_CLOEXEC = 1
_REMEDY = "set internetworking_model to tcfilter, which joins interfaces of every kind"


def open_macvtap(name: str, parent: int, queues: int, undo: ExitStack) -> tuple[int, ...]:
    """Make a macvtap on the interface with the index `parent`, in the current network namespace, with a descriptor for
    each queue; `undo` closes them. The macvtap itself stays: who knows its name removes it.

    Raises HostUnsupported; OSError when the host is short of something.
    """
    with Rtnetlink() as rtnl, ExitStack() as failed:
        below = next((link for link in rtnl.links() if link.ifindex == parent), None)
        if below is None:
            raise HostUnsupported(f"cannot make the macvtap {name}: interface {parent} of the pod is gone")
        try:
            rtnl.add_macvtap(name, parent)
        except OSError as err:
            raise _refused(below, err) from err
        made = next(link.ifindex for link in rtnl.links() if link.name == name)
        failed.callback(rtnl.delete_link, made)
        fds = _opened(name, made, queues, undo)
        failed.pop_all()
    return fds


def _refused(below: Link, err: OSError) -> OSError | HostUnsupported:
    if err.errno in SHORTAGES:
        return err
    why = {
        errno.EOPNOTSUPP: "this kernel has no macvtap; load the module macvtap",
        errno.EBUSY: f"something else takes its packets already; {_REMEDY}",
    }.get(err.errno or 0, f"{err.strerror}: the kernel has none for this kind of interface; {_REMEDY}")
    return HostUnsupported(
        f"cannot make a macvtap on interface {below.name} of the pod ({below.kind or 'hardware'}): {why}"
    )


def _opened(name: str, ifindex: int, queues: int, undo: ExitStack) -> tuple[int, ...]:
    try:
        with _file_system("sysfs") as sysfs:
            path = f"class/net/{name}/macvtap/tap{ifindex}/dev"
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=sysfs)
            with open(fd) as file:
                major, _, minor = file.read().strip().partition(":")
        number = os.makedev(int(major), int(minor))
        fds = []
        with _file_system("tmpfs") as devices:
            os.mknod(name, stat.S_IFCHR | 0o600, number, dir_fd=devices)
            for _ in range(queues):
                fd = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=devices)
                undo.callback(os.close, fd)
                set_up(fd, name, queues)
                fds.append(fd)
    except OSError as err:
        if err.errno in SHORTAGES:
            raise
        raise HostUnsupported(f"cannot open the macvtap {name}: {err.strerror}") from err
    return tuple(fds)


@contextmanager
def _file_system(kind: str) -> Iterator[int]:
    """A descriptor of a new file system's root, which is mounted nowhere and goes with the block."""
    with ExitStack() as undo:
        context = _system_call(_SYS_FSOPEN, kind.encode(), _CLOEXEC)
        undo.callback(os.close, context)
        _system_call(_SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        root = _system_call(_SYS_FSMOUNT, context, _CLOEXEC, 0)
        undo.callback(os.close, root)
        yield root


def _system_call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
