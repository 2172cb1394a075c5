"""Ending the processes of a control group, and removing it, whatever the version."""

from __future__ import annotations

import os
import time

from oci_engine.c_modules import signal
from oci_engine.errors import SetupFailed
from oci_engine.undo import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_engine.cgroups.group import Cgroup

#: How often a signal to a whole group looks for processes that it has missed.
_MAX_SIGNAL_ROUNDS = 16
# A group is busy for a moment after its last process was killed. The figures are those of other runtimes.
_REMOVE_TRIES = 5
_REMOVE_PAUSE_S = 0.02


def signal_each(pids: Callable[[], list[int]], number: int) -> None:
    """To every process, also those that are being forked right now.

    A fork either was done when its parent got the signal, and shows in the next look; or the kernel begins it anew
    after the parent took the signal. So nobody is missed once a look shows nobody new. Processes that answer the
    signal by forking show as new as well, which is why it ends.
    """
    signalled: set[int] = set()
    for _ in range(_MAX_SIGNAL_ROUNDS):
        fresh = [pid for pid in pids() if pid not in signalled]
        if not fresh:
            return
        for pid in fresh:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        signalled.update(fresh)


def kill_each(pids: Callable[[], list[int]]) -> None:
    signal_each(pids, signal.SIGKILL)


def remove_cgroup(cgroup: Cgroup) -> None:
    """With the processes in it. Raises SetupFailed when one stays."""
    pause = _REMOVE_PAUSE_S
    for attempt in range(_REMOVE_TRIES):
        cgroup.kill()
        try:
            cgroup.remove()
            return
        except OSError as err:
            if attempt == _REMOVE_TRIES - 1:
                raise SetupFailed(
                    f"the control group {err.filename} cannot be removed: {err.strerror}"
                ) from None
        time.sleep(pause)
        pause *= 2
