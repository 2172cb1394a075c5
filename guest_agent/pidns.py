"""A pid namespace that no container owns, for pods without a sandbox container whose containers share theirs."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from typing import TYPE_CHECKING

from guest_agent import syscalls

if TYPE_CHECKING:
    from typing import NoReturn

    from guest_agent.reaper import Reaper

EMPTY_DIR = "/run/kata-py/empty"


class PidNamespace:
    """Lives as long as its first process, which does nothing but adopt and reap what the containers orphan."""

    def __init__(self, pid: int, exited: asyncio.Future[int]) -> None:
        self.path = f"/proc/{pid}/ns/pid"
        self._pid = pid
        self._exited = exited

    @classmethod
    def make(cls, reaper: Reaper, empty_dir: str = EMPTY_DIR) -> PidNamespace:
        """Raises OSError."""
        os.makedirs(empty_dir, exist_ok=True)
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            syscalls.unshare(syscalls.CLONE_NEWPID)
            try:
                pid = os.fork()
                if pid == 0:
                    _be_first_process(empty_dir)
            finally:
                # Only children are in a new namespace, and no other child may be.
                syscalls.setns(own, syscalls.CLONE_NEWPID)
        finally:
            os.close(own)
        return cls(pid, reaper.watch(pid))

    @property
    def ended(self) -> bool:
        return self._exited.done()

    async def end(self) -> None:
        """Kill every process in it. Harmless when repeated."""
        if not self.ended:
            os.kill(self._pid, signal.SIGKILL)
            await asyncio.shield(self._exited)


def _be_first_process(empty_dir: str) -> NoReturn:
    """A copy of the agent that lets go of everything the agent holds: loop, connections, root directory."""
    try:
        gc.disable()  # memory stays shared with the agent as long as nobody writes to it
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
        # From inside the namespace, its first process gets only signals that it has a handler for: Python has this one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chroot(empty_dir)
        os.chdir("/")
        os.closerange(0, os.sysconf("SC_OPEN_MAX"))
        while True:
            signal.pause()
    finally:
        os._exit(1)
