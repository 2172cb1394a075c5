"""Work in a process of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.reaper import Reaper


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
