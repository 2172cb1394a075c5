"""One container: its init, its execs, and the verbs that containerd may use on them.

One lock serialises the verbs that change the container; it is never held by `Wait`, `State`, `Kill` or anything of
another container. Exits arrive on their own, at any time.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from agent_proto.gen import agent_pb2
from shim.api.gen import events_pb2
from shim.errors import AlreadyExists, GuestUnreachable, InvalidRequest, NotFound, StateConflict
from shim.events import timestamp
from shim.guest import GuestProcess
from shim.io import ProcessIO, Stdio
from shim.process import UNKNOWN_EXIT_STATUS, Exit, Process
from shim.state import State, after
from ttrpc import RpcError

if TYPE_CHECKING:
    from contextlib import ExitStack
    from pathlib import Path

    from google.protobuf.message import Message

    from agent_proto.client import AgentClient
    from agent_proto.gen.agent_pb2 import StatsContainerResponse
    from agent_proto.gen.oci_pb2 import LinuxResources
    from agent_proto.gen.oci_pb2 import Process as OciProcess
    from shim.events import Publisher

log = structlog.get_logger()

_SIGKILL = 9
# All processes of a container die with its init; the agent's word for the execs is at most this much behind.
_EXEC_EXITS_LIMIT_S = 2.0
# containerd gives `delete` five seconds in all; a guest that does not answer must not use them up.
_REMOVE_LIMIT_S = 3.0


class Container:
    """A container that exists in the guest. `pid` is the VM's, which stands for every process in it."""

    def __init__(
        self, container_id: str, bundle: Path, *, agent: AgentClient, events: Publisher, pid: int,
        stdio: Stdio, io: ProcessIO, undo: ExitStack,
    ) -> None:  # fmt: skip
        self.id = container_id
        self.bundle = bundle
        self.pid = pid
        self._agent = agent
        self._events = events
        self._undo = undo
        self._lock = asyncio.Lock()
        self._execs: dict[str, Process] = {}
        self._guest_alive = True
        self._deleted = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.init = Process(
            exec_id="",
            what=f"container {container_id}",
            stdio=stdio,
            io=io,
            guest=GuestProcess(agent, container_id),
            pid=pid,
        )
        self.init.watch(self._on_exit)

    def process(self, exec_id: str) -> Process:
        """The init for an empty exec id (or the container's own), else the exec.

        Raises:
            NotFound: no such exec.
        """
        if exec_id in ("", self.id):
            return self.init
        try:
            return self._execs[exec_id]
        except KeyError:
            raise NotFound(f"no exec {exec_id} in container {self.id}") from None

    @property
    def processes(self) -> list[Process]:
        """The init and all execs, whatever their state."""
        return [self.init, *self._execs.values()]

    async def start(self, exec_id: str) -> Process:
        """Run the init or an exec.

        Raises:
            NotFound, StateConflict, RpcError (from the agent, with its code).
        """
        process = self.process(exec_id)
        # Execs start side by side; only the container's own start excludes its other verbs.
        async with self._lock if process is self.init else process.lock:
            if process is not self.init:
                self._require_running("start an exec in")
            try:
                await process.start(lambda: self._publish_start(process))
            except BaseException:
                await self._give_up(process)
                raise
            if process is not self.init:
                process.watch(self._on_exit)
        return process

    async def exec(self, exec_id: str, spec: OciProcess, stdio: Stdio) -> None:
        """Take in an exec; `start` runs it.

        Raises:
            AlreadyExists, StateConflict, InvalidRequest (stdio).
        """
        if not exec_id:
            raise InvalidRequest(f"an exec of container {self.id} needs an id")
        async with self._lock:
            if exec_id in self._execs or exec_id == self.id:
                raise AlreadyExists(f"exec {exec_id} already exists in container {self.id}")
            self._require_running("exec in")
            what = f"exec {exec_id} of container {self.id}"
            self._execs[exec_id] = Process(
                exec_id=exec_id,
                what=what,
                stdio=stdio,
                io=ProcessIO(stdio, what),
                guest=GuestProcess(self._agent, self.id, exec_id, spec),
                pid=self.pid,
            )
            self._events.publish(events_pb2.TaskExecAdded(container_id=self.id, exec_id=exec_id))

    async def kill(self, exec_id: str, signal: int) -> None:
        """Send a signal to a process; SIGKILL to the init reaches every process of the container.

        Raises:
            NotFound: no such process, or it has ended already.
        """
        process = self.process(exec_id)
        if process.state is State.STOPPED:
            raise NotFound(f"{process.what} has already ended: process already finished")
        if process.state is State.CREATED and process is not self.init:
            raise StateConflict(f"cannot kill {process.what}: it has not been started")
        await process.signal(signal)

    async def pause(self) -> None:
        """Freeze all processes. Raises StateConflict unless running."""
        async with self._lock:
            after(self.init.state, "pause", self.init.what)
            await self._agent.pause_container(agent_pb2.PauseContainerRequest(container_id=self.id))
            # It may have ended while the guest worked: that state is the last one.
            self.init.state = after(self.init.state, "pause", self.init.what)
            self._events.publish(events_pb2.TaskPaused(container_id=self.id))

    async def resume(self) -> None:
        """Thaw all processes. Raises StateConflict unless paused."""
        async with self._lock:
            after(self.init.state, "resume", self.init.what)
            await self._agent.resume_container(agent_pb2.ResumeContainerRequest(container_id=self.id))
            self.init.state = after(self.init.state, "resume", self.init.what)
            self._events.publish(events_pb2.TaskResumed(container_id=self.id))

    async def update(self, resources: LinuxResources) -> None:
        """Change the limits of the container inside the guest."""
        async with self._lock:
            self._require_alive("update")
            await self._agent.update_container(
                agent_pb2.UpdateContainerRequest(container_id=self.id, resources=resources)
            )

    async def stats(self) -> StatsContainerResponse:
        """What the guest's cgroups count for the container."""
        self._require_alive("read the statistics of")
        return await self._agent.stats_container(agent_pb2.StatsContainerRequest(container_id=self.id))

    async def delete_exec(self, exec_id: str) -> Process:
        """Forget an exec that has ended or was never started. Raises NotFound, StateConflict."""
        process = self.process(exec_id)
        async with process.lock:
            self.process(exec_id)  # still there: another delete may have been first
            after(process.state, "delete", process.what)
            await process.aclose(guest_alive=self._guest_alive)
            self._execs.pop(exec_id, None)
        return process

    async def delete(self, *, remove_in_guest: bool) -> Process:
        """Let go of everything on the host, and of the container in the guest unless the whole guest goes next.

        Raises:
            StateConflict: it still runs.
            NotFound: another delete was first.
        """
        async with self._lock:
            if self._deleted:
                raise NotFound(f"{self.init.what} has been deleted already")
            after(self.init.state, "delete", self.init.what)
            if self.init.state is State.CREATED and self._guest_alive:
                await self._kill_unstarted()
            # Output that is still under way comes first: removing the container closes its pipes in the guest.
            await asyncio.gather(*(p.aclose(guest_alive=self._guest_alive) for p in self.processes))
            if remove_in_guest and self._guest_alive:
                await self._remove_in_guest()
            self._end_execs()
            self._undo_mounts()
            self._deleted = True
            self._publish_delete(self.init.exited.result())
        return self.init

    def guest_died(self, end: Exit) -> None:
        """The VM is gone: whatever still ran in it has ended, execs first."""
        self._guest_alive = False
        self._end_execs(end)
        self._finish(self.init, end)

    def _end_execs(self, end: Exit | None = None) -> None:
        """Tell the end of the execs that run as far as we know: nobody will learn more, and `Wait` must return."""
        end = end or Exit(UNKNOWN_EXIT_STATUS, time.time_ns())
        for process in reversed(self._execs.values()):
            if process.state is not State.CREATED:
                self._finish(process, end)

    async def _kill_unstarted(self) -> None:
        """An init that was made and never run has a process all the same; its end is told like any other."""
        try:
            async with asyncio.timeout(_REMOVE_LIMIT_S):
                await self._give_up(self.init)
                await self.init.wait()
        except TimeoutError:
            log.warning("unstarted_init_not_killed", container=self.id, seconds=_REMOVE_LIMIT_S)
            self._finish(self.init, Exit(UNKNOWN_EXIT_STATUS, time.time_ns()))

    def _undo_mounts(self) -> None:
        try:
            self._undo.close()
        except OSError as err:
            # All steps were tried; what is left goes with the sandbox's directory.
            log.warning("mounts_not_undone", container=self.id, error=str(err))

    async def _remove_in_guest(self) -> None:
        try:
            async with asyncio.timeout(_REMOVE_LIMIT_S):
                await self._agent.remove_container(agent_pb2.RemoveContainerRequest(container_id=self.id))
        except (RpcError, TimeoutError) as err:
            log.warning("container_not_removed_in_guest", container=self.id, error=str(err))

    async def _give_up(self, process: Process) -> None:
        """A start that failed: an exec can be deleted, an init has no other end than this one."""
        if process is self.init and process.state is State.CREATED:
            try:
                await process.signal(_SIGKILL)
            except RpcError as err:
                log.debug("kill_after_failed_start_refused", container=self.id, error=str(err))

    def _on_exit(self, process: Process, end: Exit) -> None:
        if process is self.init:
            task = asyncio.create_task(self._finish_init(end), name=f"end of container {self.id}")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._finish(process, end)

    async def _finish_init(self, end: Exit) -> None:
        """Hold back the init's exit until the exits of its execs are published."""
        running = [e.exited for e in self._execs.values() if e.state in (State.RUNNING, State.PAUSED)]
        if running:
            await asyncio.wait(running, timeout=_EXEC_EXITS_LIMIT_S)
        self._finish(self.init, end)

    def _finish(self, process: Process, end: Exit) -> None:
        if not process.set_exited(end):
            return
        log.info("process_exited", container=self.id, exec=process.exec_id, status=end.status)
        self._events.publish(
            events_pb2.TaskExit(
                container_id=self.id,
                id=process.exec_id or self.id,
                pid=process.pid,
                exit_status=end.status,
                exited_at=timestamp(end.at_ns),
            )
        )

    def _publish_start(self, process: Process) -> None:
        event: Message
        if process is self.init:
            event = events_pb2.TaskStart(container_id=self.id, pid=self.pid)
        else:
            event = events_pb2.TaskExecStarted(container_id=self.id, exec_id=process.exec_id, pid=self.pid)
        self._events.publish(event)

    def _publish_delete(self, end: Exit) -> None:
        self._events.publish(
            events_pb2.TaskDelete(
                container_id=self.id,
                pid=self.pid,
                exit_status=end.status,
                exited_at=timestamp(end.at_ns),
            )
        )

    def _require_running(self, verb: str) -> None:
        if self.init.state is not State.RUNNING:
            raise StateConflict(f"cannot {verb} container {self.id}: it is {self.init.state.name.lower()}")

    def _require_alive(self, verb: str) -> None:
        if not self._guest_alive:
            raise GuestUnreachable(f"cannot {verb} container {self.id}: its virtual machine is gone")
        if self.init.state is State.STOPPED:
            raise StateConflict(f"cannot {verb} container {self.id}: it is stopped")
