"""How much memory a program may lock that has not root's rights: what devices of the host read and write is locked."""

from __future__ import annotations

import errno
import os
import resource

_KIND = resource.RLIMIT_MEMLOCK


def allow(wanted_bytes: int) -> None:
    """Let this process, and what it becomes, lock as much if it may not yet. Raises OSError."""
    soft, hard = resource.getrlimit(_KIND)
    if _reaches(soft, wanted_bytes):
        return
    try:
        resource.setrlimit(_KIND, (wanted_bytes, hard if _reaches(hard, wanted_bytes) else wanted_bytes))
    except ValueError as err:  # that is what it makes of some of the kernel's refusals
        raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from err


def _reaches(limit: int, wanted: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= wanted
