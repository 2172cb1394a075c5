"""How a container ends: what is told of its exits, in which order, and each of them once.

The init's exit is the container's. It is held back until the exits of all execs are told, and the out-of-memory event
that caused it. All of it also ends at once, when the virtual machine does.
"""

from __future__ import annotations

import asyncio
import time
from signal import SIGKILL
from typing import TYPE_CHECKING

import structlog

from shim.process import UNKNOWN_EXIT_STATUS, Exit
from shim.state import State
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shim.container_events import ContainerEvents
    from shim.guest import GuestContainer
    from shim.process import Process

log = structlog.get_logger()

_KILLED = 128 + SIGKILL
# How long the init's exit is held back for those of its execs. They die with it, or are killed when they share another
# PID namespace, so all that takes time is the guest's telling; only a broken guest makes us wait this long.
_EXEC_EXITS_LIMIT_S = 2.0
# How long an init's exit by an unexpected SIGKILL is held back for the guest's word that memory ran out.
_OOM_ANSWER_LIMIT_S = 1.0


class ContainerEnd:
    """The end of one container, whose execs are `execs`, by their ids.

    `killed` is to be set when somebody asks for a SIGKILL to all of it; `guest_alive` says that its machine still
    runs, as far as is known, and `deleted` that its deletion has been told, after which nothing is.
    """

    def __init__(
        self,
        container_id: str,
        init: Process,
        execs: Mapping[str, Process],
        guest: GuestContainer,
        events: ContainerEvents,
    ) -> None:
        self.killed = False
        self.guest_alive = True
        self.deleted = False
        self._id = container_id
        self._init = init
        self._execs = execs
        self._guest = guest
        self._events = events
        self._oom_told = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def has_come(self) -> bool:
        """Whether the init has ended, told or not."""
        return self._init.seen is not None or self._init.state is State.STOPPED

    def on_exit(self, process: Process) -> None:
        """A process has ended in the guest, and its end may be told."""
        process.seen = process.seen or self.unlearned()
        if process is self._init:
            task = asyncio.create_task(self._finish_init(process.seen), name=f"end of container {self._id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self.finish(process, process.seen)

    def guest_died(self) -> None:
        """The machine is gone: whatever still ran in it has ended, execs first."""
        self.guest_alive = False
        self._finish_all([*self._execs.values()])
        self.finish(self._init, self._init.seen or self.unlearned())

    def out_of_memory(self) -> None:
        """The guest's kernel has killed something in the container. Once it has ended, nobody learns of it twice."""
        if self.deleted or (self._init.state is State.STOPPED and self._oom_told):
            return
        self._oom_told = True
        log.warning("out_of_memory", container=self._id)
        self._events.out_of_memory()

    def finish(self, process: Process, end: Exit) -> None:
        """Record the end of a process and tell it. Harmless when it has been."""
        if not process.set_exited(end):
            return
        tell = log.debug if process.exec_id else log.info
        tell("process_exited", container=self._id, exec=process.exec_id, status=end.status)
        self._events.exited(process, end)

    def unlearned(self) -> Exit:
        """The end of a process that nobody saw; what was killed died of that, as far as anybody can tell."""
        return Exit(_KILLED, time.time_ns()) if self.killed else unknown_end()

    def tell_deletion(self) -> None:
        """The container, which has ended, is no more."""
        self.deleted = True
        self._events.deleted(self._init)

    async def _finish_init(self, end: Exit) -> None:
        """Hold back the init's exit until what has to be told before is published."""
        if end.status == _KILLED and not self.killed and not self._oom_told:
            await self._ask_for_oom()
        left = [e for e in self._execs.values() if e.starting or e.state is State.RUNNING]
        if left:
            try:
                async with asyncio.timeout(_EXEC_EXITS_LIMIT_S):
                    await self._kill(left)
                    await asyncio.wait([e.exited for e in left])
            except TimeoutError:
                log.warning("execs_outlive_their_container", container=self._id, count=len(left))
            self._finish_all(left)
        self.finish(self._init, end)

    def _finish_all(self, execs: Sequence[Process]) -> None:
        """End them as far as we know: nobody will learn more, and `Wait` must return."""
        for process in execs:
            end = process.seen or self.unlearned()
            if process.state is State.RUNNING:
                self.finish(process, end)
            else:
                process.set_exited(end)  # no start was told, and none will be: so no end is

    async def _kill(self, execs: Sequence[Process]) -> None:
        """Execs die with their init unless they share another PID namespace."""
        try:
            await self._guest.signal_all(SIGKILL, [process.exec_id for process in execs])
        except RpcError as err:
            log.debug("execs_not_killed", container=self._id, error=str(err))

    async def _ask_for_oom(self) -> None:
        """Somebody killed the init: its cgroup knows whether that was the kernel, before the guest's event is here."""
        try:
            async with asyncio.timeout(_OOM_ANSWER_LIMIT_S):
                counters = (await self._guest.stats()).cgroup_stats.memory_stats.stats
        except (RpcError, TimeoutError) as err:
            log.debug("oom_kills_unknown", container=self._id, error=str(err))
            return
        if counters.get("events.oom_kill", 0) and not self._oom_told:
            self.out_of_memory()


def unknown_end() -> Exit:
    """The end, now, of a process whose exit status nobody can learn."""
    return Exit(UNKNOWN_EXIT_STATUS, time.time_ns())
