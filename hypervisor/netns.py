"""Network namespaces: entering one for a moment, and making one.

A namespace is a thread's, and nothing waits inside of `entered` or begins a thread there, so nobody else ever runs in
the wrong one.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hypervisor.errors import SHORTAGES, HostUnsupported

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_OWN = "/proc/self/ns/net"


def open_netns(path: Path | str) -> int:
    """A descriptor of the namespace. Raises HostUnsupported; OSError when the host is short of something."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as err:
        if err.errno in SHORTAGES:
            raise
        raise HostUnsupported(
            f"cannot open network namespace {path}: {err.strerror}; does the sandbox exist?"
        ) from err


@contextmanager
def entered(path: Path | None) -> Iterator[None]:
    """What is done in the block is done in that namespace; None is the current one. Nothing may be awaited in it.

    Raises HostUnsupported when the namespace cannot be entered.
    """
    if path is None:
        yield
        return
    with contextlib.ExitStack() as undo:
        own = open_netns(_OWN)
        undo.callback(os.close, own)
        other = open_netns(path)
        undo.callback(os.close, other)
        _setns(other, path)
        undo.callback(_setns, own, _OWN)
        yield


def new_netns() -> int:
    """A descriptor of a new namespace, which lasts as long as somebody has it open or is in it.

    Raises HostUnsupported when there may be no more.
    """
    own = open_netns(_OWN)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(CLONE_NEWNET) != 0:
            raise HostUnsupported(
                f"cannot make a network namespace: {os.strerror(ctypes.get_errno())}; "
                "see /proc/sys/user/max_net_namespaces"
            )
        try:
            return open_netns(_OWN)
        finally:
            _setns(own, _OWN)
    finally:
        os.close(own)


def _setns(fd: int, path: Path | str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET) != 0:
        raise HostUnsupported(
            f"cannot enter network namespace {path}: {os.strerror(ctypes.get_errno())}; "
            "the shim needs CAP_SYS_ADMIN over it"
        )
