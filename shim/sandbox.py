"""A sandbox: one virtual machine, its agent, and the containers that live in it. Here is which containers there are,
who needs the guest, and how it all ends.

The machine starts to boot as soon as the daemon runs, before containerd has asked for anything: what a container
needs on the host is prepared meanwhile. How a guest comes up is `shim.bring_up`, how a container is made is
`shim.creation`. For a first container of another architecture, the machine is replaced.

A sandbox lives as long as its containers: it goes with the last of them. With containerd's Sandbox API, which is
`shim.pod_sandbox`, it has a life of its own instead: it is there before the first container and after the last.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import structlog

from config import ConfigError
from config.schema import ANNOTATION_PREFIX
from config.schema.hypervisor import ARCHITECTURES
from hypervisor.errors import BootFailed, HypervisorError
from shim import architecture, oci
from shim.background import Background
from shim.bring_up import bring_up
from shim.creation import Creation, Surroundings
from shim.errors import AlreadyExists, GuestUnreachable, InvalidRequest, NotFound, StateConflict
from shim.process import UNKNOWN_EXIT_STATUS, Exit
from shim.sizing import demand_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from agent_proto.gen.oci_pb2 import LinuxResources
    from agent_proto.gen.oci_pb2 import Process as OciProcess
    from hypervisor.qemu.machine import Machine
    from shim.boot import Boot
    from shim.bring_up import RunningGuest
    from shim.container import Container
    from shim.creation import CreateRequest
    from shim.events import Publisher
    from shim.share import SharedDir

log = structlog.get_logger()

# What of a failed boot's console goes into the log, where a line has to fit into a pipe.
_CONSOLE_LINES, _CONSOLE_COLUMNS = 50, 200


class Sandbox:
    """The VM and its containers. All methods belong to the event loop's thread.

    `outlives_containers` says that only `stop` ends it; `etc` are then the files of /etc that containers get which do
    not bring their own, by the containers' path. `ended` is set when the machine has died or has been stopped.
    """

    def __init__(
        self,
        sandbox_id: str,
        boot: Boot,
        share: SharedDir,
        events: Publisher,
        *,
        namespace: str,
        outlives_containers: bool,
    ) -> None:
        self.id = sandbox_id
        self.outlives_containers = outlives_containers
        self.etc: Mapping[str, Path] = {}
        self.ended: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._boot = boot
        self._share = share
        self._events = events
        self._namespace = namespace
        self._containers: dict[str, Container] = {}
        self._creating: set[str] = set()
        self._machine: Machine | None = None
        self._running: RunningGuest | None = None
        self._background = Background()
        self._up: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    def bring_up(self) -> None:
        """Begin to bring the guest up; `create_container` waits for it and reports its failure."""
        if self._boot.failure is None:
            self._up = asyncio.create_task(self._bring_up(), name="bring up")

    @property
    def pid(self) -> int:
        """The VM's process id, 0 while there is none. It stands for every process of the sandbox."""
        return self._machine.pid if self._machine else 0

    def container(self, container_id: str) -> Container:
        """The container. Raises NotFound."""
        try:
            return self._containers[container_id]
        except KeyError:
            raise NotFound(f"no container {container_id} in sandbox {self.id}") from None

    @property
    def containers(self) -> Sequence[Container]:
        """All containers, the oldest first."""
        return list(self._containers.values())

    @property
    def processes(self) -> Mapping[str, int]:
        """Pids of the programs that make up the machine, by name; none while there is no machine."""
        return dict(self._machine.pids) if self._machine else {}

    @property
    def is_up(self) -> bool:
        """Whether the guest has been set up; `ended` says whether it still is."""
        return self._running is not None

    @property
    def needed(self) -> bool:
        """Whether somebody still counts on it: a container, also one that is being made, or the Sandbox API."""
        return self.outlives_containers or bool(self._containers or self._creating)

    async def wait_until_up(self) -> None:
        """Wait for what `bring_up` began. Raises GuestUnreachable, HypervisorError, RpcError (the agent)."""
        await (await self._guest()).divided()

    async def create_container(self, request: CreateRequest) -> Container:
        """Make a container in the guest; the first waits for the guest to be up.

        Raises:
            AlreadyExists, InvalidRequest, GuestUnreachable, HookFailed, NetworkNotMirrored, HypervisorError,
            OSError (a mount), RpcError (the agent).
        """
        container_id = request.container_id
        if container_id in self._containers or container_id in self._creating:
            raise AlreadyExists(f"container {container_id} already exists in sandbox {self.id}")
        self._creating.add(container_id)
        try:
            container = await self._create(request)
        except BaseException:
            if self._running is not None and self._stopping is None:
                self._running.sizing.give_back()
            raise
        finally:
            self._creating.discard(container_id)
        self._containers[container_id] = container
        return container

    async def delete_container(self, container: Container) -> None:
        """Remove a container that has ended. When nobody else needs the guest it goes too: `stop` is begun, not
        awaited."""
        last = set(self._containers) == {container.id} and not self._creating and not self.outlives_containers
        # What the guest has not written to its disks yet would go with it.
        await container.delete(remove_in_guest=not last or container.writes_to_disks)
        self._containers.pop(container.id, None)
        if not self.needed:
            self._begin_stop()
        else:
            if self._running is not None:
                self._running.sizing.give_back()
            if self._machine is not None:
                # The guest may take its time to let go of them, and nobody waits for that.
                taking = self._boot.devices.take_back(container.id, self._machine)
                self._background.begin(taking, f"devices of {container.id}")

    async def resume_container(self, container: Container) -> None:
        """Thaw a container. Raises StateConflict unless paused, RpcError."""
        await container.resume()
        if self._running is not None and self._running.clock is not None:
            self._running.clock.correct_soon()

    async def update_container(self, container: Container, resources: LinuxResources) -> None:
        """Change a container's limits: the machine grows before, and shrinks some time after.

        Raises:
            StateConflict: it has ended.
            InvalidRequest: a cpuset that is none.
            GuestUnreachable, HypervisorError, RpcError (the agent).
        """
        container.require_updatable()
        sizing = (await self._guest()).sizing
        before = sizing.demand(container.id)
        wanted = demand_of(resources, f"container {container.id}", before)
        oci.drop_host_resources(resources)
        await sizing.make_room(container.id, wanted)
        try:
            await container.update(resources)
        except BaseException:
            sizing.remember(container.id, before)
            raise
        finally:
            sizing.give_back()

    async def stop(self) -> None:
        """Take everything down: the guest is killed, the host is as before. Harmless when repeated."""
        await asyncio.shield(self._begin_stop())

    def _begin_stop(self) -> asyncio.Task[None]:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="stop")
        return self._stopping

    async def _stop(self) -> None:
        await self._let_go()
        if self._running is not None:
            await self._running.retire(write_out=not self.ended.done())
        self._end_all()
        if self._running is not None:
            await self._running.aclose()
        await self._boot.aclose()
        self._set_ended(0)
        log.info("sandbox_stopped")

    async def _let_go(self) -> None:
        """End whatever talks to the guest in the background."""
        if self._up is not None:
            self._up.cancel()
            await asyncio.gather(self._up, return_exceptions=True)
        await self._background.cancel()

    async def _create(self, request: CreateRequest) -> Container:
        if self._boot.failure is not None:
            raise self._boot.failure
        if self._up is None:
            raise StateConflict(f"sandbox {self.id} has not been started: containers come after that")
        around = Surroundings(
            sandbox_id=self.id,
            namespace=self._namespace,
            in_pod=self.outlives_containers,
            boot=self._boot,
            share=self._share,
            etc=self.etc,
            events=self._events,
            in_background=self._background.begin,
            suit=self._suit,
            guest=self._guest,
        )
        return await Creation(request, around).make()

    async def _suit(self, container_id: str, process: OciProcess) -> None:
        """See to it that the machine runs the container's program: for the first container's it is replaced.

        Raises:
            InvalidRequest: it cannot be; says why.
        """
        boot = self._boot
        ours = boot.config.hypervisor.machine_type
        theirs = architecture.machine_type_for(str(self._share.rootfs(container_id)), process)
        if theirs in (None, ours) or self.ended.done():
            return
        what = f"container {container_id} is for {ARCHITECTURES[theirs]}"
        if reason := self._why_no_other_machine(theirs):
            raise InvalidRequest(
                f"{what}, the machine of sandbox {self.id} for {ARCHITECTURES[ours]}: {reason}"
            )
        try:
            plan = boot.planned(boot.pod, theirs)
        except (ConfigError, HypervisorError) as err:
            reason = err.in_one_line() if isinstance(err, ConfigError) else str(err)
            raise InvalidRequest(f"{what}, and there is no machine for that: {reason}") from err
        log.info("machine_replaced", reason=what, machine_type=theirs, instead_of=ours)
        await self._let_go()
        if self._running is not None:
            await self._running.retire(write_out=False)
            await self._running.aclose()
        self._machine = self._running = None
        await boot.replace(plan)
        if self._stopping is not None:
            raise GuestUnreachable(f"sandbox {self.id} is stopping")
        self.bring_up()

    def _why_no_other_machine(self, machine_type: str) -> str:
        """Why the machine has to stay as it is, and what to do; empty when it may be replaced."""
        if origin := self._boot.machine_type_set_by:
            return f"machine_type is set by {origin}; leave it out, or set it to {machine_type}"
        if self._containers or len(self._creating) > 1:
            return "all containers of a pod are of one architecture"
        if self.outlives_containers:
            key = f"{ANNOTATION_PREFIX}config.hypervisor.machine_type"
            return f"it is there before its containers; annotate the pod with {key}: {machine_type}"
        return ""

    async def _guest(self) -> RunningGuest:
        if self._up is None or self._stopping is not None:
            raise GuestUnreachable(f"sandbox {self.id} is stopping")
        await asyncio.wait([self._up])
        if self._up.cancelled():
            raise GuestUnreachable(f"sandbox {self.id} is stopping")
        self._up.result()
        if self._running is None or self._running.machine.exited.done():
            raise GuestUnreachable(f"the virtual machine of sandbox {self.id} is gone")
        return self._running

    async def _bring_up(self) -> None:
        try:
            self._machine = machine = await self._boot.machine()
            self._running = await bring_up(
                self._boot,
                machine,
                self.id,
                self._containers,
                self._background.begin,
                host_mounts=self._share.host_mounts,
            )
            self._background.begin(self._watch_machine(machine), "watch machine")
            self._boot.report()
        except Exception as err:
            self._set_ended(UNKNOWN_EXIT_STATUS)
            if isinstance(err, BootFailed):
                # The directory with the guest's console goes with the sandbox: what it said last is kept here.
                console = [line[:_CONSOLE_COLUMNS] for line in err.console_tail[-_CONSOLE_LINES:]]
                log.error("guest_not_up", reason=str(err), console=console, qemu=list(err.stderr_tail))
            raise

    async def _watch_machine(self, machine: Machine) -> None:
        end = await asyncio.shield(machine.exited)
        log.error("machine_died", reason=str(end), containers=len(self._containers))
        self._end_all()
        self._set_ended(UNKNOWN_EXIT_STATUS)

    def _set_ended(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(Exit(status, time.time_ns()))

    def _end_all(self) -> None:
        for container in self._containers.values():
            container.guest_died()
