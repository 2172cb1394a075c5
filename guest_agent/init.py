"""What PID 1 does before anything else: a usable root, the kernel's file systems, drivers, the listening socket."""

from __future__ import annotations

import _socket
import os
import time
from typing import TYPE_CHECKING

from guest_agent import cmdline, syscalls
from guest_agent.modules import BOOT, Modules

if TYPE_CHECKING:
    from guest_agent.cmdline import Settings

_SECURE = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
#: source, target, type, flags, data; in this order.
MOUNTS = (
    ("proc", "/proc", "proc", _SECURE, ""),
    ("sysfs", "/sys", "sysfs", _SECURE, ""),
    ("devtmpfs", "/dev", "devtmpfs", syscalls.MS_NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", "devpts", syscalls.MS_NOSUID | syscalls.MS_NOEXEC, "mode=0620,ptmxmode=0666"),
    ("shm", "/dev/shm", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777"),  # noqa: S108
    ("run", "/run", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=0755"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", _SECURE, "nsdelegate"),
)
#: On a root that cannot be written to, for whatever expects that it can.
SCRATCH = ("tmp", "/tmp", "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=1777")  # noqa: S108
HOST_CID = 2
READY_TIMEOUT_S = 1.0
#: A connection that arrives while the imports still run waits here instead of being refused.
BACKLOG = 128


def root_is_image() -> bool:
    """Whether the root is a disk, which is mounted read-only, and not the initial RAM file system."""
    return bool(os.statvfs("/").f_flag & os.ST_RDONLY)


def replace_root() -> None:
    """Put a mount on top of the initial root, which cannot be pivoted away from, so that containers can.

    The bind mount shows the same files. Every process we start inherits it as its root.
    """
    syscalls.mount("/", "/mnt", "", syscalls.MS_BIND)
    os.chdir("/mnt")
    syscalls.mount("/mnt", "/", "", syscalls.MS_MOVE)
    os.chroot(".")


def mount_kernel_file_systems() -> None:
    """Raises OSError naming the target."""
    for source, target, fstype, flags, data in MOUNTS:
        if target.startswith("/dev/"):
            os.makedirs(target, exist_ok=True)
        syscalls.mount(source, target, fstype, flags, data)
    for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        if not os.path.lexists(f"/dev/{name}"):
            os.symlink(target, f"/dev/{name}")


def read_settings() -> Settings:
    with open("/proc/cmdline") as file:
        return cmdline.parse(file.read())


def listen(port: int) -> _socket.socket:
    """A listening vsock socket. Raises OSError."""
    sock = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    sock.bind((_socket.VMADDR_CID_ANY, port))
    sock.listen(BACKLOG)
    return sock


def tell_ready(port: int, init_s: float) -> None:
    """Connect to the host and say when PID 1 started and when it listened, both in seconds since boot.

    Raises OSError when the host does not take it; that is its choice, and it will find our socket by itself.
    """
    ready_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    sock = _socket.socket(_socket.AF_VSOCK, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(READY_TIMEOUT_S)
        sock.connect((HOST_CID, port))
        sock.sendall(b'{"init_s": %.6f, "ready_s": %.6f}\n' % (init_s, ready_s))
    finally:
        sock.close()


def boot(modules: Modules) -> Settings:
    """Everything up to "the host can reach us". Raises OSError naming what failed."""
    if root_is_image():
        syscalls.mount(*SCRATCH)
    else:
        replace_root()
    mount_kernel_file_systems()
    for name in BOOT:
        modules.load_if_present(name)
    return read_settings()
