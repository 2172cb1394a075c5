"""The one place that waits for children. PID 1 is the parent of every orphan of the guest, so it waits for any
child, not only for those it started.

A container's process is started by the engine, and is ours only after the engine ended. It may be dead before
its pid is known to us; `births()` keeps the statuses of unknown children for as long as that can happen.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

#: Statuses of unknown children kept while somebody expects a birth. Far more than can die in one engine run.
MAX_UNKNOWN = 4096


class Reaper:
    """Collects exit codes: 0 to 255 as the process said, or 128 plus the signal that ended it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watched: dict[int, asyncio.Future[int]] = {}
        self._unknown: OrderedDict[int, int] = OrderedDict()
        self._births = 0

    def start(self) -> None:
        """Begin; needs the main thread."""
        self._loop.add_signal_handler(signal.SIGCHLD, self.reap)
        self.reap()

    def stop(self) -> None:
        self._loop.remove_signal_handler(signal.SIGCHLD)

    def watch(self, pid: int) -> asyncio.Future[int]:
        """The exit code of a child, once it has one. Ask right after the start, or inside `births()`."""
        future: asyncio.Future[int] = self._loop.create_future()
        if pid in self._unknown:
            future.set_result(self._unknown.pop(pid))
        else:
            self._watched[pid] = future
        return future

    def births(self) -> _Births:
        """`with reaper.births():` around starting a process whose pid becomes known only later.

        Inside, a dead child nobody asked for is remembered. Outside it is forgotten, so that an old status cannot
        be taken for that of a new process which got the same pid.
        """
        return _Births(self)

    def reap(self) -> None:
        """Take every status there is. Signals of several children may arrive as one."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._died(pid, exit_code(status))

    def _died(self, pid: int, code: int) -> None:
        future = self._watched.pop(pid, None)
        if future is not None:
            if not future.done():
                future.set_result(code)
        elif self._births:
            self._unknown[pid] = code
            if len(self._unknown) > MAX_UNKNOWN:
                self._unknown.popitem(last=False)

    def _birth_began(self) -> None:
        self._births += 1

    def _birth_ended(self) -> None:
        self._births -= 1
        if self._births == 0:
            self._unknown.clear()


class _Births:
    def __init__(self, reaper: Reaper) -> None:
        self._reaper = reaper

    def __enter__(self) -> None:
        self._reaper._birth_began()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reaper._birth_ended()


def exit_code(status: int) -> int:
    """What a shell would say of a wait status."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
