"""Keeps the interpreter's own file from being written by a container.

A process that enters a container is still an interpreter of the host, and can be looked at through /proc: a program
in the container may open `/proc/PID/exe` of it, and once that process is gone overwrite the host's interpreter. So it
runs from a read-only mount of its file that is attached nowhere, through which nobody can write.
"""

from __future__ import annotations

import os

from oci_engine import linux

_RDONLY = 1  # MOUNT_ATTR_RDONLY of linux/mount.h


def run_sealed() -> None:
    """Executes this same program again in that way, unless it already does. Raises OSError."""
    executable = "/proc/self/exe"
    if os.statvfs(executable).f_flag & os.ST_RDONLY:
        return
    with open("/proc/self/cmdline", "rb") as file:
        arguments = file.read().split(b"\0")[:-1]
    sealed = linux.open_tree(linux.AT_FDCWD, executable, linux.OPEN_TREE_CLONE)
    linux.mount_setattr(sealed, set_=_RDONLY)
    os.execve(sealed, arguments, os.environb)  # noqa: S606
