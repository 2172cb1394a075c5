"""A sandbox: one virtual machine, its agent, and the containers that live in it.

The machine starts to boot as soon as the daemon runs, before containerd has asked for anything: what a container
needs on the host is prepared meanwhile. Whatever was acquired is on one stack, and leaves in reverse order.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import structlog

from agent_proto.gen import agent_pb2
from hypervisor.errors import BootFailed
from shim import agent_log, oci, paths
from shim.api.gen import events_pb2
from shim.bundle import Bundle
from shim.container import Container
from shim.errors import AlreadyExists, GuestUnreachable, NotFound
from shim.io import ProcessIO
from shim.process import UNKNOWN_EXIT_STATUS, Exit
from shim.share import GUEST_ROOT, TAG
from shim.vmspec import wants_agent_log
from ttrpc import ConnectionClosed, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Sequence
    from pathlib import Path

    from agent_proto.client import AgentClient
    from agent_proto.gen.oci_pb2 import Spec as OciSpec
    from hypervisor.qemu.machine import Machine
    from shim.api.gen.types_pb2 import Mount as ProtoMount
    from shim.boot import Boot
    from shim.events import Publisher
    from shim.io import Stdio
    from shim.share import SharedDir

T = TypeVar("T")
log = structlog.get_logger()

_SANDBOX_DIR = "/run/kata-containers/sandbox"
_SHM_BYTES = 64 << 20
# A machine that goes down breaks the agent's connection a moment before QEMU has ended.
_LAST_WORDS_S = 1.0
# What of a failed boot's console goes into the log, where a line has to fit into a pipe.
_CONSOLE_LINES, _CONSOLE_COLUMNS = 50, 200


class CreateRequest(NamedTuple):
    """What `Task.Create` asks for."""

    container_id: str
    bundle: Path
    rootfs: Sequence[ProtoMount]
    stdio: Stdio


class Sandbox:
    """The VM and its containers. All methods belong to the event loop's thread."""

    def __init__(self, sandbox_id: str, boot: Boot, share: SharedDir, events: Publisher) -> None:
        self.id = sandbox_id
        self._boot = boot
        self._share = share
        self._events = events
        self._containers: dict[str, Container] = {}
        self._creating: set[str] = set()
        self._resources = AsyncExitStack()
        self._background: set[asyncio.Task[None]] = set()
        self._machine: Machine | None = None
        self._agent: AgentClient | None = None
        self._up: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None

    def bring_up(self) -> None:
        """Begin to bring the guest up; `create_container` waits for it and reports its failure."""
        if self._boot.failure is None:
            self._up = asyncio.create_task(self._bring_up(self._boot), name="bring up")

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
    def empty(self) -> bool:
        """Whether no container exists or is being made."""
        return not self._containers and not self._creating

    async def create_container(self, request: CreateRequest) -> Container:
        """Make a container in the guest; the first waits for the guest to be up.

        Raises:
            AlreadyExists, InvalidRequest, GuestUnreachable, HypervisorError, OSError (a mount), RpcError (the agent).
        """
        container_id = request.container_id
        if container_id in self._containers or container_id in self._creating:
            raise AlreadyExists(f"container {container_id} already exists in sandbox {self.id}")
        self._creating.add(container_id)
        try:
            container = await self._create(request)
        finally:
            self._creating.discard(container_id)
        self._containers[container_id] = container
        return container

    async def delete_container(self, container: Container) -> None:
        """Remove a container that has ended. With the last one goes the guest: `stop` is begun, not awaited."""
        last = set(self._containers) == {container.id} and not self._creating
        await container.delete(remove_in_guest=not last)
        self._containers.pop(container.id, None)
        if self.empty:
            self._begin_stop()

    async def stop(self) -> None:
        """Take everything down: the guest is killed, the host is as before. Harmless when repeated."""
        await asyncio.shield(self._begin_stop())

    def _begin_stop(self) -> asyncio.Task[None]:
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(), name="stop")
        return self._stopping

    async def _stop(self) -> None:
        for task in (self._up, *self._background):
            if task is not None and not task.done():
                task.cancel()
        await asyncio.gather(*filter(None, (self._up, *self._background)), return_exceptions=True)
        self._end_all()
        await self._resources.aclose()
        await self._boot.aclose()
        log.info("sandbox_stopped")

    async def _create(self, request: CreateRequest) -> Container:
        if self._boot.failure is not None:
            raise self._boot.failure
        bundle = self._boot.bundle
        if request.bundle != bundle.path:
            bundle = Bundle.load(request.container_id, request.bundle)
        what = f"container {request.container_id}"
        spec = oci.spec_to_proto(bundle.raw, "config.json")
        with ExitStack() as undo:
            io = ProcessIO(request.stdio, what)
            undo.callback(io.abort)
            rootfs = self._share.add_rootfs(request.container_id, request.rootfs, bundle.rootfs, undo)
            joins_pidns = oci.edit_for_guest(
                spec,
                rootfs=rootfs,
                container_type=_container_type(bundle),
                bundle=str(bundle.path),
                keep_seccomp=not self._boot.config.runtime.disable_guest_seccomp,
            )
            self._share_mounts(spec, bundle, undo)
            agent, machine = await self._guest()
            message = agent_pb2.CreateContainerRequest(
                container_id=request.container_id,
                exec_id=request.container_id,
                OCI=spec,
                sandbox_pidns=joins_pidns,
            )
            await _answered(agent.create_container(message), machine)
            container = Container(
                request.container_id,
                bundle.path,
                agent=agent,
                events=self._events,
                pid=machine.pid,
                stdio=request.stdio,
                io=io,
                undo=undo.pop_all(),
            )
        self._publish_create(request, machine.pid)
        return container

    def _publish_create(self, request: CreateRequest, pid: int) -> None:
        stdin, stdout, stderr, terminal = request.stdio
        self._events.publish(
            events_pb2.TaskCreate(
                container_id=request.container_id,
                bundle=str(request.bundle),
                rootfs=request.rootfs,
                io=events_pb2.TaskIO(stdin=stdin, stdout=stdout, stderr=stderr, terminal=terminal),
                pid=pid,
            )
        )

    def _share_mounts(self, spec: OciSpec, bundle: Bundle, undo: ExitStack) -> None:
        """Make host directories and files of the spec's mounts reachable in the guest, and name them so."""
        for mount in spec.Mounts:
            if mount.destination == "/dev/shm" and mount.type != "ephemeral":  # noqa: S108 - the container's
                mount.type, mount.source = "bind", f"{_SANDBOX_DIR}/shm"
                mount.options[:] = ["rbind"]
            elif mount.type == "bind" or {"bind", "rbind"} & set(mount.options):
                # A relative source is relative to the bundle (runtime-spec config.md, "Mounts").
                source = str(bundle.path / mount.source)
                mount.source = self._share.add_volume(source, readonly="ro" in mount.options, undo=undo)
                mount.type = "bind"

    async def _guest(self) -> tuple[AgentClient, Machine]:
        if self._up is None or self._stopping is not None:
            raise GuestUnreachable(f"sandbox {self.id} is stopping")
        await asyncio.wait([self._up])
        if self._up.cancelled():
            raise GuestUnreachable(f"sandbox {self.id} is stopping")
        self._up.result()
        if self._agent is None or self._machine is None or self._machine.exited.done():
            raise GuestUnreachable(f"the virtual machine of sandbox {self.id} is gone")
        return self._agent, self._machine

    async def _bring_up(self, boot: Boot) -> None:
        try:
            await self._bring_up_guest(boot)
        except BootFailed as err:
            # The directory with the guest's console goes with the sandbox: what it said last is kept here.
            console = [line[:_CONSOLE_COLUMNS] for line in err.console_tail[-_CONSOLE_LINES:]]
            log.error("guest_not_up", reason=str(err), console=console, qemu=list(err.stderr_tail))
            raise

    async def _bring_up_guest(self, boot: Boot) -> None:
        async with AsyncExitStack() as undo:
            machine = await boot.machine()
            self._machine = machine
            agent = await undo.enter_async_context(boot.agent(machine))
            if policy := boot.config.agent.policy:
                await _answered(agent.set_policy(agent_pb2.SetPolicyRequest(policy=policy)), machine)
            await _answered(agent.create_sandbox(self._create_sandbox_request()), machine)
            self._resources = undo.pop_all()
        self._agent = agent
        self._in_background(self._watch_machine(machine), "watch machine")
        self._in_background(self._watch_oom(agent), "watch for OOM")
        if wants_agent_log(boot.config):
            self._in_background(agent_log.forward(machine, boot.config.agent.log_port), "agent's log")
        boot.report()

    def _create_sandbox_request(self) -> agent_pb2.CreateSandboxRequest:
        spec = self._boot.bundle.spec
        storages = [
            agent_pb2.Storage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                options=["noexec", "nosuid", "nodev", "mode=1777", f"size={_SHM_BYTES}"],
                mount_point=f"{_SANDBOX_DIR}/shm",
            )
        ]
        if self._boot.config.hypervisor.shared_fs != "none":
            storages.insert(
                0,
                agent_pb2.Storage(
                    driver="virtio-fs",
                    source=TAG,
                    fstype="virtiofs",
                    options=["nodev"],
                    mount_point=f"{GUEST_ROOT}/",
                ),
            )
        words = [module.split() for module in self._boot.config.agent.kernel_modules]
        return agent_pb2.CreateSandboxRequest(
            hostname=spec.hostname[:64],
            dns=_dns_lines(self._boot.bundle),
            storages=storages,
            sandbox_id=self.id,
            guest_hook_path=self._boot.config.hypervisor.guest_hook_path,
            kernel_modules=[agent_pb2.KernelModule(name=name, parameters=rest) for name, *rest in words],
        )

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _watch_machine(self, machine: Machine) -> None:
        end = await asyncio.shield(machine.exited)
        log.error("machine_died", reason=str(end), containers=len(self._containers))
        self._end_all()

    def _end_all(self) -> None:
        for container in self._containers.values():
            container.guest_died(Exit(UNKNOWN_EXIT_STATUS, time.time_ns()))

    async def _watch_oom(self, agent: AgentClient) -> None:
        while True:
            try:
                event = await agent.get_oom_event(agent_pb2.GetOOMEventRequest())
            except ConnectionClosed:
                return
            except RpcError as err:
                log.debug("oom_events_unavailable", error=str(err))
                return
            if event.container_id in self._containers:
                log.warning("out_of_memory", container=event.container_id)
                self._events.publish(events_pb2.TaskOOM(container_id=event.container_id))


async def _answered(call: Awaitable[T], machine: Machine) -> T:
    """Wait for the agent's answer; a connection that breaks because the machine ends is told by its reason.

    Raises:
        BootFailed: the machine ended; quotes its last words.
        RpcError: the agent refused.
    """
    answer = asyncio.ensure_future(call)
    ends: list[asyncio.Future[Any]] = [answer, machine.exited]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if answer.done() and not isinstance(answer.exception(), ConnectionClosed):
            return answer.result()
        await asyncio.wait([machine.exited], timeout=_LAST_WORDS_S)
        raise machine.failure("the guest's agent is gone", "it closed the connection")
    finally:
        answer.cancel()


def _container_type(bundle: Bundle) -> str:
    annotations = bundle.spec.annotations
    if bundle.sandbox_id != bundle.container_id:
        return "pod_container"
    in_pod = any(annotations.get(key) in ("sandbox", "podsandbox") for key, _ in paths.POD_ANNOTATIONS)
    return "pod_sandbox" if in_pod else "single_container"


def _dns_lines(bundle: Bundle) -> list[str]:
    for mount in bundle.spec.mounts:
        if mount.destination == "/etc/resolv.conf" and mount.source:
            try:
                with open(mount.source) as file:
                    return file.read(65536).split("\n")
            except (OSError, UnicodeDecodeError) as err:
                log.warning("resolv_conf_unreadable", path=mount.source, error=str(err))
    return []
