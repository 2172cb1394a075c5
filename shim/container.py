"""One container: its init, its execs, and the verbs that containerd may use on them.

The rules are those of runc's shim. One lock keeps the verbs apart that move the container as a whole: start, pause,
resume, delete. It is never held by anything else, nor by anything of another container, and no longer than the
container lives. Exits arrive on their own, at any time. What is published comes in this order, each event once: of an
exec added, started, exit, deleted; of the container the exits of all its execs before its own, and its deletion last.
"""

from __future__ import annotations

import asyncio
from signal import SIGKILL
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from shim.container_end import ContainerEnd, unknown_end
from shim.container_events import ContainerEvents
from shim.errors import AlreadyExists, GuestUnreachable, InvalidRequest, NotFound, StateConflict
from shim.io import ProcessIO, Stdio
from shim.process import Process
from shim.state import State, after
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from contextlib import ExitStack
    from pathlib import Path

    from agent_proto.gen.agent_pb2 import StatsContainerResponse
    from agent_proto.gen.oci_pb2 import LinuxResources
    from agent_proto.gen.oci_pb2 import Process as OciProcess
    from shim.disks import ContainerDisks
    from shim.events import Publisher
    from shim.guest import GuestContainer
    from shim.hooks import HostHooks

T = TypeVar("T")
log = structlog.get_logger()

_LAST_SIGNAL = 64
# How many execs of a container the guest is asked to start at once. It makes one after the other: were a hundred
# waiting there, the time limit of a call would be over for most of them before their turn.
_STARTS_AT_ONCE = 8
# A guest's time to list its processes.
_PIDS_LIMIT_S = 2.0
# A deletion's time for a guest that does not answer; containerd gives `delete` five seconds in all.
_DELETE_LIMIT_S = 3.5
# What of that is left for the removal in the guest when output took its time.
_REMOVE_LIMIT_S = 1.0
# The same while the guest writes to the container's disks what it has in memory: up to gigabytes, and lost otherwise.
_WRITE_LIMIT_S = 60.0


class Container:
    """A container that exists in the guest. `pid` is the VM's, which stands for every process in it; `before_start` is
    what has to be done before its init runs.
    """

    def __init__(
        self, container_id: str, bundle: Path, *, guest: GuestContainer, events: Publisher,
        namespace: str, stdio: Stdio, io: ProcessIO, undo: ExitStack, hooks: HostHooks | None = None,
        disks: ContainerDisks | None = None,
        before_start: Callable[[], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        self.id = container_id
        self.bundle = bundle
        self.pid = guest.pid
        self._guest = guest
        self._events = ContainerEvents(events, container_id, guest.pid)
        self._namespace = namespace
        self._undo = undo
        self._hooks = hooks
        self._disks = disks
        self._before_start = before_start
        self._lock = asyncio.Lock()
        self._execs: dict[str, Process] = {}
        self._adding: set[str] = set()
        self._turns = asyncio.Semaphore(_STARTS_AT_ONCE)
        self._pausing = False
        self.init = Process(
            exec_id="",
            what=f"container {container_id}",
            stdio=stdio,
            io=io,
            guest=guest.process(),
            pid=self.pid,
        )
        self._end = ContainerEnd(container_id, self.init, self._execs, guest, self._events)
        self.init.watch(self._end.on_exit)

    @property
    def writes_to_disks(self) -> bool:
        """Whether the guest may have something of the container's that is not on a disk yet."""
        return self._disks is not None and self._disks.written

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

    def state_of(self, process: Process) -> State:
        """The state as containerd is told: a container that is paused has all its processes paused."""
        if process.state is not State.RUNNING:
            return process.state
        if self.init.state is State.PAUSED:
            return State.PAUSED
        return State.PAUSING if self._pausing else State.RUNNING

    async def start(self, exec_id: str) -> Process:
        """Run the init or an exec.

        Raises:
            NotFound, StateConflict, InvalidRequest (stdin), RpcError (from the agent, with its code).
        """
        process = self.process(exec_id)
        if process is self.init:
            async with self._lock:
                await self._start_init()
        else:
            async with process.lock:  # execs start side by side
                self._require_present(process)  # a delete may have been first
                await self._start_exec(process)
        return process

    async def _start_init(self) -> None:
        after(self.init.state, "start", self.init.what)
        try:
            if self._before_start is not None:
                await self._before_start()
            await self.init.start(lambda: self._events.started(self.init))
        except BaseException:
            await self._kill_quietly(self.init)  # it has no other end than this one
            raise
        if self._hooks is not None:
            await self._hooks.started()

    async def _start_exec(self, process: Process) -> None:
        after(process.state, "start", process.what)
        self._require("start an exec in", State.CREATED, State.RUNNING)
        await self._while_it_lives("start an exec in", self._turns.acquire())
        try:
            # Its turn may have been long in coming.
            self._require("start an exec in", State.CREATED, State.RUNNING)
            await self._run_exec(process)
        finally:
            self._turns.release()

    async def _run_exec(self, process: Process) -> None:
        try:
            await process.start(lambda: self._events.started(process))
        except BaseException as err:
            # There is nothing left to start or to wait for; containerd deletes it next.
            process.set_exited(unknown_end())
            refused = isinstance(err, (InvalidRequest, RpcError))
            if not refused or (isinstance(err, RpcError) and err.code is Code.DEADLINE_EXCEEDED):
                await self._kill_quietly(process)  # the guest may run it all the same
            raise
        process.watch(self._end.on_exit)

    async def exec(self, exec_id: str, spec: OciProcess, stdio: Stdio) -> None:
        """Take in an exec; `start` runs it.

        Raises:
            AlreadyExists, StateConflict, InvalidRequest (stdio).
        """
        if not exec_id:
            raise InvalidRequest(f"an exec of container {self.id} needs an id")
        if exec_id in self._execs or exec_id in self._adding or exec_id == self.id:
            raise AlreadyExists(f"exec {exec_id} already exists in container {self.id}")
        self._require("exec in", State.CREATED, State.RUNNING)
        what = f"exec {exec_id} of container {self.id}"
        self._adding.add(exec_id)
        try:
            io = await ProcessIO.open(stdio, what, owner=exec_id, namespace=self._namespace)
            try:
                self._require("exec in", State.CREATED, State.RUNNING)  # opening may have taken its time
            except StateConflict:
                io.abort()
                raise
        finally:
            self._adding.discard(exec_id)
        self._execs[exec_id] = Process(
            exec_id=exec_id,
            what=what,
            stdio=stdio,
            io=io,
            guest=self._guest.process(exec_id, spec),
            pid=self.pid,
        )
        self._events.exec_added(exec_id)

    async def kill(self, exec_id: str, number: int, *, to_all: bool = False) -> None:
        """Send a signal to a process; SIGKILL to the init, or `to_all`, reaches every process of the container.

        Raises:
            NotFound: no such process, or it has ended already.
            StateConflict: an exec that does not run yet.
            InvalidRequest: no such signal.
        """
        process = self.process(exec_id)
        if not 0 < number <= _LAST_SIGNAL:
            raise InvalidRequest(f"cannot kill {process.what}: there is no signal {number}")
        if process.state is State.STOPPED:
            raise NotFound(f"{process.what} has already ended: process already finished")
        if process is not self.init:
            if process.state is State.CREATED:
                raise StateConflict(f"cannot kill {process.what}: it has not been started")
            await process.signal(number)
        elif number == SIGKILL:
            self._end.killed = True
            await self._guest.kill()
        elif to_all:
            await self._guest.signal_all(number, [process.exec_id for process in self._running_execs()])
        else:
            await process.signal(number)

    async def pids(self) -> list[tuple[int, str]]:
        """The processes of the container and the execs that they are of, "" for none.

        Process ids are the guest's. Where it cannot tell, the VM's stands for each process known here. Never empty and
        never late: when containerd (from 1.7 on) starts, it asks this of one task after the other, and deletes those
        without processes as left-overs, even if they have ended meanwhile and nobody has read their exit status.
        """
        known = [(self.pid, process.exec_id) for process in (self.init, *self._running_execs())]
        if self.init.state is State.STOPPED:
            return known
        try:
            async with asyncio.timeout(_PIDS_LIMIT_S):
                found = await self._guest.processes()
        except (RpcError, TimeoutError) as err:
            log.warning("pids_not_told", container=self.id, error=str(err) or "the guest does not answer")
            return known
        return [(pid, exec_id if exec_id in self._execs else "") for pid, exec_id in found or ()] or known

    async def pause(self) -> None:
        """Freeze all processes. Raises StateConflict unless running."""
        async with self._lock:
            after(self.init.state, "pause", self.init.what)
            self._pausing = True
            try:
                await self._while_it_lives("pause", self._guest.pause())
            finally:
                self._pausing = False
            # It may have ended while the guest worked: that state is the last one.
            self.init.state = after(self.init.state, "pause", self.init.what)
            self._events.paused()

    async def resume(self) -> None:
        """Thaw all processes. Raises StateConflict unless paused."""
        async with self._lock:
            after(self.init.state, "resume", self.init.what)
            await self._while_it_lives("resume", self._guest.resume())
            self.init.state = after(self.init.state, "resume", self.init.what)
            self._events.resumed()

    def require_updatable(self) -> None:
        """Raises StateConflict when it has ended."""
        self._require("update", State.CREATED, State.RUNNING, State.PAUSED)

    async def update(self, resources: LinuxResources) -> None:
        """Change the limits of the container inside the guest. Raises StateConflict when it has ended."""
        self.require_updatable()
        await self._while_it_lives("update", self._guest.update(resources))

    async def stats(self) -> StatsContainerResponse:
        """What the guest's cgroups count for the container; they outlive its processes."""
        if not self._end.guest_alive:
            raise GuestUnreachable(
                f"cannot read the statistics of container {self.id}: its virtual machine is gone"
            )
        return await self._guest.stats()

    def out_of_memory(self) -> None:
        """The guest's kernel has killed something in the container."""
        self._end.out_of_memory()

    async def delete_exec(self, exec_id: str) -> Process:
        """Forget an exec that has ended or was never started. Raises NotFound, StateConflict."""
        process = self.process(exec_id)
        async with process.lock:
            self._require_present(process)  # another delete may have been first
            after(process.state, "delete", process.what)
            await process.aclose(guest_alive=self._end.guest_alive)
            self._require_present(process)  # the whole container may have gone meanwhile
            self._forget_exec(process)
        return process

    async def delete(self, *, remove_in_guest: bool) -> Process:
        """Let go of everything on the host, and of the container in the guest unless the whole guest goes next.

        Raises:
            StateConflict: it still runs.
            NotFound: another delete was first.
        """
        now = asyncio.get_running_loop().time
        until = now() + _DELETE_LIMIT_S
        async with self._lock:
            if self._end.deleted:
                raise NotFound(f"{self.init.what} has been deleted already")
            after(self.init.state, "delete", self.init.what)
            if self.init.state is State.CREATED:
                await self._end_unstarted(until)
            # Output that is still under way comes first: removing the container closes its pipes in the guest.
            processes = (self.init, *self._execs.values())
            await asyncio.gather(*(p.aclose(guest_alive=self._end.guest_alive) for p in processes))
            if remove_in_guest and self._end.guest_alive:
                limit_s = _WRITE_LIMIT_S if self.writes_to_disks else _REMOVE_LIMIT_S
                await self._remove_in_guest(max(until, now() + limit_s))
            if self._disks is not None and self._end.guest_alive:
                await self._disks.release()
            self._undo_mounts()
            if self._hooks is not None:
                await self._hooks.stopped()
            for process in list(self._execs.values()):
                self._forget_exec(process)
            self._end.tell_deletion()
        return self.init

    def guest_died(self) -> None:
        """The VM is gone: whatever still ran in it has ended."""
        self._end.guest_died()

    def _running_execs(self) -> list[Process]:
        return [e for e in self._execs.values() if e.state is State.RUNNING]

    def _forget_exec(self, process: Process) -> None:
        # Its deletion is known to containerd also when it never ran; who waits for it must not wait for ever.
        process.set_exited(self._end.unlearned())
        del self._execs[process.exec_id]
        self._events.deleted(process)

    async def _end_unstarted(self, until: float) -> None:
        """An init that was made and never run has a process all the same; its end is told like any other."""
        try:
            async with asyncio.timeout_at(until):
                self._end.killed = True
                await self._kill_quietly(self.init)
                await self.init.wait()
        except TimeoutError:
            log.warning("unstarted_init_not_killed", container=self.id, seconds=_DELETE_LIMIT_S)
            self._end.finish(self.init, self._end.unlearned())

    def _undo_mounts(self) -> None:
        try:
            self._undo.close()
        except OSError as err:
            # All steps were tried; what is left goes with the sandbox's directory.
            log.warning("mounts_not_undone", container=self.id, error=str(err))

    async def _remove_in_guest(self, until: float) -> None:
        try:
            async with asyncio.timeout_at(until):
                await self._guest.remove()
        except (RpcError, TimeoutError) as err:
            log.warning(
                "container_not_removed_in_guest",
                container=self.id,
                error=str(err) or "the agent does not answer",
            )

    async def _kill_quietly(self, process: Process) -> None:
        """After a start that failed: whether there is anything to kill, only the guest knows."""
        if process.state is State.CREATED or process is not self.init:
            try:
                async with asyncio.timeout(_REMOVE_LIMIT_S):
                    await process.signal(SIGKILL)
            except (RpcError, TimeoutError) as err:
                log.debug("kill_after_failed_start_refused", process=process.what, error=str(err))

    async def _while_it_lives(self, verb: str, request: Coroutine[Any, Any, T]) -> T:
        """What is waited for, such as the guest's answer; a container that ends first needs none.

        Raises:
            StateConflict: it ended. RpcError: the guest refused.
        """
        answer = asyncio.create_task(request)
        try:
            ends: set[asyncio.Future[Any]] = {answer, self.init.exited}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise StateConflict(f"cannot {verb} container {self.id}: it is stopped")
        finally:
            answer.cancel()

    def _require_present(self, process: Process) -> None:
        """Its id may be that of a new exec by now."""
        if self._execs.get(process.exec_id) is not process:
            raise NotFound(f"{process.what} has been deleted already")

    def _require(self, verb: str, *states: State) -> None:
        state = State.STOPPED if self._end.has_come else self.init.state
        if state not in states:
            raise StateConflict(f"cannot {verb} container {self.id}: it is {state.name.lower()}")
