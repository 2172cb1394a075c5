"""What a container's control group is able to do, whatever the version."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from oci_engine.errors import SetupFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    from oci_engine.plan import CgroupMount
    from oci_engine.resources_spec import Resources

#: How often a signal to a whole group looks for processes that it has missed.
_MAX_SIGNAL_ROUNDS = 16
# A group is busy for a moment after its last process was killed. The figures are those of other runtimes.
_REMOVE_TRIES = 5
_REMOVE_PAUSE_S = 0.02


class Cgroup(Protocol):
    """One container's group. `paths` has the host's directories by controller, with one entry "" in version 2."""

    paths: dict[str, str]

    def create(self) -> None:
        """Make it; harmless if it is there."""

    def limit(self, resources: Resources, *, devices: bool = True) -> None:
        """Set what is asked for, leave the rest. Raises SetupFailed."""

    def add(self, pid: int) -> None:
        """Move a process into it."""

    def pids(self) -> list[int]:
        """Of its processes and those of groups below."""

    def freeze(self, frozen: bool) -> None:
        """Returns when it is done."""

    def is_frozen(self) -> bool: ...

    def kill(self) -> None:
        """SIGKILL to every process, frozen ones too."""

    def remove(self) -> None:
        """With all groups below. Raises OSError while a process lives in one."""

    def mounts(self) -> tuple[CgroupMount, ...]:
        """What the container sees of it at a mount of type cgroup."""

    def stats(self) -> dict[str, object]:
        """As the `data` of runc's events have it."""


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
