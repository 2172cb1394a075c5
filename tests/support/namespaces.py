"""A part of a test in a namespace of its own: nothing that it mounts, or does to interfaces, is seen outside of it or
outlives it.
"""

from __future__ import annotations

import os
import select
import traceback
from socket import AF_INET6
from typing import TYPE_CHECKING

import pytest

from guest_agent import syscalls
from netlink.routes import RTN_LOCAL
from netlink.rtnl import Rtnetlink, changes, drain
from shim import mounts

if TYPE_CHECKING:
    from collections.abc import Callable

_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_SKIPPED = 77


def in_mount_namespace(work: Callable[[], None]) -> None:
    """Run `work` in a forked child. Skips without CAP_SYS_ADMIN, or if `work` does; fails with its traceback."""
    _in_child(mounts.enter_private_mount_namespace, work)


def in_network_namespace(work: Callable[[], None]) -> None:
    """Run `work` in a forked child that has nothing but a loopback interface; likewise."""
    _in_child(lambda: syscalls.unshare(_CLONE_NEWNET), work)


def until_addresses_serve() -> None:
    """The kernel makes an IPv6 address's route to itself a moment after the address."""
    with changes() as news, Rtnetlink() as rtnl:
        while True:
            drain(news)
            here = {route.destination for route in rtnl.routes() if route.kind == RTN_LOCAL}
            if all(f"{entry.address}/128" in here for entry in rtnl.addresses() if entry.family == AF_INET6):
                return
            assert select.select([news], [], [], 20)[0]


def _in_child(enter: Callable[[], object], work: Callable[[], None]) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, text = 0, ""
        try:
            try:
                enter()
            except PermissionError:
                pytest.skip("needs CAP_SYS_ADMIN for a namespace")
            work()
        except pytest.skip.Exception as err:
            code, text = _SKIPPED, str(err)
        except BaseException:
            code, text = 1, traceback.format_exc()
        os.write(writer, text.encode()[-60000:])
        os._exit(code)
    os.close(writer)
    with open(reader) as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == _SKIPPED:
        pytest.skip(text)
    assert code == 0, text
