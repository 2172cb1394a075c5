"""One process of a container: the init, or one started by exec."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

from guest_agent.errors import NotFound

if TYPE_CHECKING:
    from guest_agent.stdio import Stdio

#: Signals that mean "go away": a process that is gone has obeyed.
_ENDING = frozenset({int(signal.SIGKILL), int(signal.SIGTERM)})


class Process:
    """A process known by its pid, its streams and its exit code."""

    def __init__(self, name: str, pid: int, stdio: Stdio, exited: asyncio.Future[int]) -> None:
        self.name = name
        self.pid = pid
        self.stdio = stdio
        self.exited = exited
        self._asked = False

    @property
    def running(self) -> bool:
        return not self.exited.done()

    @property
    def owed(self) -> bool:
        """Whether the host is still to get the exit code, or some of the output."""
        return not self._asked or self.stdio.owed

    async def wait(self) -> int:
        """The exit code, as often as it is asked for."""
        self._asked = True
        return await asyncio.shield(self.exited)

    def signal(self, number: int) -> None:
        """Send a signal. Raises NotFound when the process has exited, unless the signal was to end it."""
        if self.running:
            try:
                os.kill(self.pid, number)
                return
            except ProcessLookupError:
                pass  # it died, and we have not been told yet
        if number not in _ENDING:
            raise NotFound(f"process {self.name} has exited")


def heeds(pid: int, number: int) -> bool:
    """Whether a process handles, blocks or deliberately ignores a signal.

    The first process of a pid namespace never gets a signal whose action it left at the default, except for
    SIGKILL; sent to one that heeds nothing, a SIGTERM would be lost without a trace.
    """
    try:
        with open(f"/proc/{pid}/status") as file:
            lines = file.read().splitlines()
    except FileNotFoundError:
        return False
    mask = 0
    for line in lines:
        name, _, value = line.partition(":")
        if name in ("SigCgt", "SigBlk", "SigIgn"):
            mask |= int(value, 16)
    return bool(mask >> (number - 1) & 1)
