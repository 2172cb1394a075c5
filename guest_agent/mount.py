"""Mount options as flags and data, and what is mounted where."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from guest_agent import syscalls

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Option: (flag, whether the option clears it).
_FLAGS = {
    "async": (syscalls.MS_SYNCHRONOUS, True),
    "atime": (syscalls.MS_NOATIME, True),
    "bind": (syscalls.MS_BIND, False),
    "defaults": (0, False),
    "dev": (syscalls.MS_NODEV, True),
    "diratime": (syscalls.MS_NODIRATIME, True),
    "dirsync": (syscalls.MS_DIRSYNC, False),
    "exec": (syscalls.MS_NOEXEC, True),
    "lazytime": (syscalls.MS_LAZYTIME, False),
    "mand": (syscalls.MS_MANDLOCK, False),
    "noatime": (syscalls.MS_NOATIME, False),
    "nodev": (syscalls.MS_NODEV, False),
    "nodiratime": (syscalls.MS_NODIRATIME, False),
    "noexec": (syscalls.MS_NOEXEC, False),
    "nomand": (syscalls.MS_MANDLOCK, True),
    "norelatime": (syscalls.MS_RELATIME, True),
    "nostrictatime": (syscalls.MS_STRICTATIME, True),
    "nosuid": (syscalls.MS_NOSUID, False),
    "nosymfollow": (syscalls.MS_NOSYMFOLLOW, False),
    "rbind": (syscalls.MS_BIND | syscalls.MS_REC, False),
    "relatime": (syscalls.MS_RELATIME, False),
    "remount": (syscalls.MS_REMOUNT, False),
    "ro": (syscalls.MS_RDONLY, False),
    "rw": (syscalls.MS_RDONLY, True),
    "silent": (syscalls.MS_SILENT, False),
    "strictatime": (syscalls.MS_STRICTATIME, False),
    "suid": (syscalls.MS_NOSUID, True),
    "sync": (syscalls.MS_SYNCHRONOUS, False),
}
_PROPAGATION = {
    "private": syscalls.MS_PRIVATE,
    "rprivate": syscalls.MS_PRIVATE | syscalls.MS_REC,
    "rshared": syscalls.MS_SHARED | syscalls.MS_REC,
    "rslave": syscalls.MS_SLAVE | syscalls.MS_REC,
    "runbindable": syscalls.MS_UNBINDABLE | syscalls.MS_REC,
    "shared": syscalls.MS_SHARED,
    "slave": syscalls.MS_SLAVE,
    "unbindable": syscalls.MS_UNBINDABLE,
}


class Options:
    """Parsed options: flags of mount(2), data for the file system, and propagation to set afterwards."""

    __slots__ = ("data", "flags", "propagation")

    def __init__(self, flags: int, data: str, propagation: tuple[int, ...]) -> None:
        self.flags = flags
        self.data = data
        self.propagation = propagation


def parse(options: Iterable[str]) -> Options:
    """What is not a flag is data for the file system, in the order given; a later flag wins over an earlier."""
    flags, data, propagation = 0, [], []
    for option in options:
        if option in _FLAGS:
            bits, clears = _FLAGS[option]
            flags = flags & ~bits if clears else flags | bits
        elif option in _PROPAGATION:
            propagation.append(_PROPAGATION[option])
        elif option:
            data.append(option)
    return Options(flags, ",".join(data), tuple(propagation))


def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
    """Mount with OCI-style options on a target that exists. A read-only bind takes two calls.

    Raises OSError, with nothing mounted.
    """
    parsed = parse(options)
    if fstype == "bind":
        fstype, parsed.flags = "", parsed.flags | syscalls.MS_BIND
    syscalls.mount(source, target, fstype, parsed.flags, parsed.data)
    restricting = parsed.flags & ~(syscalls.MS_BIND | syscalls.MS_REC)
    try:
        if parsed.flags & syscalls.MS_BIND and restricting:
            syscalls.mount("", target, "", restricting | syscalls.MS_BIND | syscalls.MS_REMOUNT)
        for flags in parsed.propagation:
            syscalls.mount("", target, "", flags)
    except OSError:
        if not parsed.flags & syscalls.MS_REMOUNT:
            unmount(target)
        raise


def unmount(target: str) -> None:
    """Unmount, at once or as soon as nobody uses it. What is not mounted is not an error. Raises OSError."""
    try:
        syscalls.umount(target, syscalls.MNT_DETACH)
    except (FileNotFoundError, OSError) as err:
        if not isinstance(err, FileNotFoundError) and err.errno != 22:  # EINVAL: not a mount point
            raise


def is_mount_point(path: str) -> bool:
    """Looked up in the kernel's list, since a bind within one file system cannot be seen from outside."""
    wanted = os.path.normpath(path).replace(" ", "\\040")
    with open("/proc/self/mountinfo") as file:
        return any(line.split(" ", 5)[4] == wanted for line in file)
