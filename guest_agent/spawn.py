"""Starting programs, the only place that does. Nothing of the agent leaks into them but what is named."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.reaper import Reaper

_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}


async def run(reaper: Reaper, program: str, argv: list[str], fds: tuple[int, int, int]) -> int:
    """Run a program to its end and return its exit code. `fds` become its stdin, stdout and stderr.

    Every other descriptor of ours is close-on-exec, and the signals that Python ignores are back at their default.
    Raises OSError when it cannot be started.
    """
    pid = os.posix_spawn(
        program,
        argv,
        _ENVIRONMENT,
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(fds)],
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGXFSZ),
    )
    return await reaper.watch(pid)


async def aside(reaper: Reaper, work: Callable[[], None]) -> None:
    """Do something that may wait long for the kernel in a child of ours: nothing but system calls, since the child has
    our memory as it was. Raises OSError as the work did, without its words.
    """
    with reaper.births():
        pid = os.fork()
        if pid == 0:
            code = 255
            try:
                work()
                code = 0
            except OSError as err:
                code = err.errno or 255
            finally:
                os._exit(code)
        ended = reaper.watch(pid)
    code = await ended
    if code != 0:
        raise OSError(code, os.strerror(code))
