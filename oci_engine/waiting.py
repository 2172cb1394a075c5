"""Waiting for processes that the engine itself starts beside those of containers: hooks, and makers of namespaces.

A caller that collects all of its children by itself, as the first process of a machine does, gives another way.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    #: Returns the exit status of a child as shells tell it: 128 and the signal for one that was killed.
    #: Raises ChildProcessError when nobody knows.
    Wait = Callable[[int], int]
    #: Is told what the specification wants a warning for.
    Warn = Callable[[str], None]


def wait_for_child(pid: int) -> int:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status
