"""A sandbox: one virtual machine, its agent, and the containers that live in it.

The machine starts to boot as soon as the daemon runs, before containerd has asked for anything: what a container
needs on the host is prepared meanwhile. Whatever was acquired is on one stack, and leaves in reverse order.

A sandbox lives as long as its containers: it goes with the last of them. With containerd's Sandbox API, which is
`shim.pod_sandbox`, it has a life of its own instead: it is there before the first container and after the last.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import structlog

from agent_proto.gen import agent_pb2
from config import ConfigError
from config.schema import ANNOTATION_PREFIX
from config.schema.hypervisor import ARCHITECTURES
from hypervisor.errors import BootFailed, HypervisorError
from shim import agent_log, architecture, disk_needs, names, oci, oom, paths, stand_in
from shim.api.gen import events_pb2
from shim.bundle import Bundle
from shim.clock import GuestClock
from shim.container import Container
from shim.errors import AlreadyExists, GuestUnreachable, InvalidRequest, NotFound, NotSupported, StateConflict
from shim.guest import Guest, GuestContainer
from shim.hooks import HostHooks
from shim.io import ProcessIO
from shim.liveness import Liveness
from shim.log import number_of
from shim.pod import dns_of
from shim.process import UNKNOWN_EXIT_STATUS, Exit
from shim.share import GUEST_PASSTHROUGH, GUEST_ROOT, TAG, guest_rootfs
from shim.sizing import Sizing, demand_of
from shim.vmspec import shares_by_9p, wants_agent_log
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from agent_proto.client import AgentClient
    from agent_proto.gen.oci_pb2 import LinuxResources
    from agent_proto.gen.oci_pb2 import Mount as OciMount
    from agent_proto.gen.oci_pb2 import Process as OciProcess
    from agent_proto.gen.oci_pb2 import Spec as OciSpec
    from hypervisor.qemu.machine import Machine
    from shim.api.gen.types_pb2 import Mount as ProtoMount
    from shim.boot import Boot
    from shim.disk_needs import Needs
    from shim.disks import ContainerDisks, Disks
    from shim.events import Publisher
    from shim.host_sockets import HostSockets
    from shim.io import Stdio
    from shim.mirror import Mirrors
    from shim.share import SharedDir

T = TypeVar("T")
log = structlog.get_logger()

_SANDBOX_DIR = "/run/kata-containers/sandbox"
# A machine that goes down breaks the agent's connection a moment before QEMU has ended.
_LAST_WORDS_S = 1.0
# The guest's time to end what still runs in it, and to write to its disks, when the sandbox is stopped.
_WRITE_OUT_LIMIT_S = 10.0
# What of a failed boot's console goes into the log, where a line has to fit into a pipe.
_CONSOLE_LINES, _CONSOLE_COLUMNS = 50, 200


class CreateRequest(NamedTuple):
    """What `Task.Create` asks for."""

    container_id: str
    bundle: Path
    rootfs: Sequence[ProtoMount]
    stdio: Stdio


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
        self._resources = AsyncExitStack()
        self._background: set[asyncio.Task[None]] = set()
        self._machine: Machine | None = None
        self._inside: Guest | None = None
        self._mirrors: Mirrors | None = None
        self._names_served = False
        self._sizing: Sizing | None = None
        self._host_sockets: HostSockets | None = None
        self._clock: GuestClock | None = None
        self._disks: Disks | None = None
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
        return self._inside is not None

    @property
    def needed(self) -> bool:
        """Whether somebody still counts on it: a container, also one that is being made, or the Sandbox API."""
        return self.outlives_containers or bool(self._containers or self._creating)

    async def wait_until_up(self) -> None:
        """Wait for what `bring_up` began. Raises GuestUnreachable, HypervisorError, RpcError (the agent)."""
        await self._guest()

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
            if self._sizing is not None:
                self._sizing.give_back()
            if self._machine is not None:
                # The guest may take its time to let go of them, and nobody waits for that.
                self._in_background(
                    self._boot.devices.take_back(container.id, self._machine), f"devices of {container.id}"
                )

    async def resume_container(self, container: Container) -> None:
        """Thaw a container. Raises StateConflict unless paused, RpcError."""
        await container.resume()
        if self._clock is not None:
            self._clock.correct_soon()

    async def update_container(self, container: Container, resources: LinuxResources) -> None:
        """Change a container's limits: the machine grows before, and shrinks some time after.

        Raises:
            StateConflict: it has ended.
            InvalidRequest: a cpuset that is none.
            GuestUnreachable, HypervisorError, RpcError (the agent).
        """
        container.require_updatable()
        await self._guest()
        sizing = self._sizing
        assert sizing is not None
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
        if self._mirrors is not None:
            self._mirrors.close()
        if self._disks is not None:
            await self._write_out(self._disks)
        self._end_all()
        await self._resources.aclose()
        await self._boot.aclose()
        self._set_ended(0)
        log.info("sandbox_stopped")

    async def _write_out(self, disks: Disks) -> None:
        """Let the guest write to its disks what containers that still run have written, as a machine does that is shut
        down; and stop waiting for disks to go."""
        await disks.aclose()
        if self._inside is None or self.ended.done() or not disks.writes():
            return
        try:
            async with asyncio.timeout(_WRITE_OUT_LIMIT_S):
                await self._inside.agent.destroy_sandbox(agent_pb2.DestroySandboxRequest())
        except (RpcError, TimeoutError) as err:
            log.warning("disks_not_written", error=str(err) or "the guest does not answer")

    async def _let_go(self) -> None:
        """End whatever talks to the guest in the background."""
        for task in (self._up, *self._background):
            if task is not None and not task.done():
                task.cancel()
        await asyncio.gather(*filter(None, (self._up, *self._background)), return_exceptions=True)

    async def _create(self, request: CreateRequest) -> Container:
        if self._boot.failure is not None:
            raise self._boot.failure
        if self._up is None:
            raise StateConflict(f"sandbox {self.id} has not been started: containers come after that")
        bundle = self._boot.bundle
        if bundle is None or request.bundle != bundle.path:
            bundle = Bundle.load(request.container_id, request.bundle)
        stand_in.put_in_place(bundle.path)
        what = f"container {request.container_id}"
        spec = oci.spec_to_proto(bundle.raw, "config.json")
        oci.check(spec)
        privileged = oci.allows_every_device(spec.Linux.Resources)
        wanted = self._boot.devices.wanted_by(spec, privileged=privileged)
        if self._boot.config.hypervisor.confidential_guest:
            raise InvalidRequest(
                f"{what}: its root file system cannot reach a confidential guest: no files are shared with it, and in "
                "this version images are pulled by the host; run it in a guest without confidential_guest"
            )
        with ExitStack() as undo:
            io = await ProcessIO.open(
                request.stdio, what, owner=request.container_id, namespace=self._namespace
            )
            undo.callback(io.abort)
            needs = disk_needs.devices_on_disks(spec, self._boot.config.hypervisor)
            rootfs = self._add_rootfs(request, bundle, needs, undo)
            await self._suit(request.container_id, spec.Process)
            demand = demand_of(spec.Linux.Resources, what)
            joins_pidns = oci.edit_for_guest(
                spec,
                rootfs=rootfs,
                container_type="pod_container" if self.outlives_containers else _container_type(bundle),
                bundle=str(bundle.path),
                keep_seccomp=not self._boot.config.runtime.disable_guest_seccomp,
            )
            if spec.Linux.HasField("Seccomp"):
                architecture.fit_seccomp(spec.Linux.Seccomp, self._boot.config.hypervisor.machine_type)
            self._boot.devices.edit(spec, wanted)
            needs.name_devices_in(spec)
            self._add_pod_settings(spec)
            kubelets, storages = self._share_mounts(spec, bundle, needs, undo)
            guest, machine = await self._guest()
            await self._mirror(kubelets, guest, undo)
            assert self._sizing is not None
            undo.callback(self._sizing.forget, request.container_id)
            await self._sizing.make_room(request.container_id, demand)
            if self._boot.config.runtime.proxy_host_sockets:
                await self._offer_sockets(spec, guest, machine, undo)
            devices = await self._boot.devices.give(request.container_id, wanted, machine) if wanted else ()
            message = agent_pb2.CreateContainerRequest(
                container_id=request.container_id,
                devices=devices,
                exec_id=request.container_id,
                storages=storages,
                sandbox_pidns=joins_pidns,
                shared_mounts=oci.shared_mounts(spec, self._boot.config.runtime.shared_mounts),
            )
            hooks = HostHooks(bundle, machine.pid, self._share.host_mounts)
            disks: ContainerDisks | None = None
            try:
                disks = await self._attach(needs, message, machine)
                message.OCI.CopyFrom(spec)
                if await hooks.prepare():
                    await self._boot.network.catch_up(guest.agent, machine)
                await self._serve_names(bundle, guest)
                await hooks.create(self._boot.network.netns)
                await self._create_in_guest(message, guest, machine)
            except BaseException:
                if disks is not None:
                    await disks.release()
                await hooks.stopped()
                if wanted:
                    taking = self._boot.devices.take_back(request.container_id, machine)
                    self._in_background(taking, f"devices of {what}")
                raise
            container = Container(
                request.container_id,
                bundle.path,
                guest=GuestContainer(guest, request.container_id),
                events=self._events,
                namespace=self._namespace,
                stdio=request.stdio,
                io=io,
                undo=undo.pop_all(),
                hooks=hooks,
                disks=disks,
                before_start=partial(self._before_start, bundle, guest, machine),
            )
        self._publish_create(request, machine.pid)
        return container

    async def _before_start(self, bundle: Bundle, guest: Guest, machine: Machine) -> None:
        """Docker and nerdctl bring the network, and its name server, between Create and Start."""
        if bundle.container_id == self.id:
            await self._boot.network.catch_up(guest.agent, machine)
        await self._serve_names(bundle, guest)

    async def _serve_names(self, bundle: Bundle, guest: Guest) -> None:
        """See to Docker's name server, if the container is to ask that."""
        netns = self._boot.network.netns
        if self._names_served or netns is None:
            return
        if names.is_asked_for((*dns_of(bundle), *self._boot.pod.dns)):
            self._names_served = True
            if await names.begin(guest.agent):
                self._in_background(names.serve(guest.agent, netns), "serve names")

    def _add_rootfs(self, request: CreateRequest, bundle: Bundle, needs: Needs, undo: ExitStack) -> str:
        """See to it that the guest finds the root file system, and return where; one on a disk it mounts itself."""
        container_id = request.container_id
        disk = disk_needs.rootfs_on_disk(
            container_id,
            request.rootfs,
            guest_rootfs(container_id),
            self._boot.config.hypervisor,
            self._share.host_mounts,
        )
        if disk is None:
            return self._share.add_rootfs(container_id, request.rootfs, bundle.rootfs, undo)
        needs.disks.append(disk)
        return self._share.add_guests_rootfs(container_id, undo)

    async def _attach(
        self, needs: Needs, message: agent_pb2.CreateContainerRequest, machine: Machine
    ) -> ContainerDisks | None:
        """Plug in the disks that the container needs."""
        if not needs.disks:
            return None
        if self._disks is None:
            from shim.disks import Disks

            self._disks = Disks(machine, self._share.host_mounts)
        return await self._disks.attach(needs.disks, message)

    async def _create_in_guest(
        self, message: agent_pb2.CreateContainerRequest, guest: Guest, machine: Machine
    ) -> None:
        try:
            await _answered(guest.agent.create_container(message), machine)
        except RpcError as err:
            if err.code is Code.DEADLINE_EXCEEDED:
                forgetting = _forget(guest.agent, message.container_id)
                self._in_background(forgetting, f"forget container {message.container_id}")
            raise

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
        await self._resources.aclose()
        self._machine = self._inside = self._sizing = self._clock = self._disks = None
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

    def _add_pod_settings(self, spec: OciSpec) -> None:
        """Give the container what the pod's first container brings where there is one: /etc files and sysctls."""
        mounted = {mount.destination for mount in spec.Mounts}
        access = "ro" if spec.Root.Readonly else "rw"
        for destination, file in self.etc.items():
            if destination not in mounted:
                options = ["rbind", "rprivate", access]
                spec.Mounts.add(destination=destination, type="bind", source=str(file), options=options)
        for name, value in self._boot.pod.sysctls.items():
            if name not in spec.Linux.Sysctl:
                spec.Linux.Sysctl[name] = value

    def _share_mounts(
        self, spec: OciSpec, bundle: Bundle, needs: Needs, undo: ExitStack
    ) -> tuple[list[tuple[str, OciMount]], list[agent_pb2.Storage]]:
        """Make host directories and files of the spec's mounts reachable in the guest, and name them so. Returns those
        that a kubelet changes, each with its source on the host, and what the guest has to mount itself; adds to
        `needs` those that are disks of the guest."""
        kubelets, storages, devices = [], [], []
        qemu, namespace = self._boot.config.hypervisor, self._share.host_mounts
        for index, mount in enumerate(spec.Mounts):
            if oci.is_pods_shm(mount, (self.id, bundle.container_id)):
                mount.type, mount.source = "bind", f"{_SANDBOX_DIR}/shm"
                mount.options[:] = ["rbind"]
                continue
            # A relative source is relative to the bundle (runtime-spec config.md, "Mounts").
            source = str(bundle.path / mount.source)
            if need := disk_needs.volume_on_disk(mount, source, qemu, namespace):
                needs.disks.append(need)
                if need.container_path:
                    devices.append(index)
            elif disk_needs.has_file_system(mount, namespace):
                mount.source = self._share.add_file_system(mount.type, mount.source, mount.options, undo)
                mount.type, mount.options[:] = "bind", disk_needs.of_bind(mount.options)
            elif oci.is_bind(mount):
                mount.source, inherited = self._share.add_volume(source, mount.options, undo)
                place = str(self._share.on_host(mount.source))
                oci.check_empty_dir(source, place, self._boot.config.runtime.emptydir_mode)
                if (storage := oci.huge_pages_storage(source, place, spec)) is not None:
                    storages.append(storage)
                    mount.source = storage.mount_point
                if oci.is_kubelets(source, mount.options):
                    kubelets.append((source, mount))
                mount.options.extend(inherited)
                mount.type = "bind"
        for index in reversed(devices):
            del spec.Mounts[index]
        return kubelets, storages

    async def _mirror(self, kubelets: Sequence[tuple[str, OciMount]], guest: Guest, undo: ExitStack) -> None:
        """Where the guest can have a copy of a volume that tells of its changes, the container gets that."""
        if kubelets and self._mirrors is None:
            from shim.mirror import Mirrors

            self._mirrors = Mirrors(self._in_background)
        for source, mount in kubelets:
            assert self._mirrors is not None
            if copy := await self._mirrors.add(guest, self._share.on_host(mount.source), source, undo):
                mount.source = copy

    async def _offer_sockets(self, spec: OciSpec, guest: Guest, machine: Machine, undo: ExitStack) -> None:
        """Let the container reach the host's sockets that it mounts, and those in the directories that it mounts."""
        from shim.host_sockets import HostSockets, find

        if self._host_sockets is None:
            self._host_sockets = HostSockets(guest, machine.vsock, self._in_background)
        mounts = list(spec.Mounts)
        del spec.Mounts[:]
        for mount in mounts:
            spec.Mounts.append(mount)
            if not mount.source.startswith(f"{GUEST_PASSTHROUGH}/"):
                continue
            for place, fd in find(self._share.on_host(mount.source)):
                path = f"{mount.destination.rstrip('/')}/{place}".rstrip("/")
                source = await self._host_sockets.offer(fd, f"{path} of the container", undo)
                if place:
                    spec.Mounts.add(destination=path, type="bind", source=source, options=["bind"])
                else:
                    spec.Mounts[-1].source = source

    async def _guest(self) -> tuple[Guest, Machine]:
        if self._up is None or self._stopping is not None:
            raise GuestUnreachable(f"sandbox {self.id} is stopping")
        await asyncio.wait([self._up])
        if self._up.cancelled():
            raise GuestUnreachable(f"sandbox {self.id} is stopping")
        self._up.result()
        if self._inside is None or self._machine is None or self._machine.exited.done():
            raise GuestUnreachable(f"the virtual machine of sandbox {self.id} is gone")
        return self._inside, self._machine

    async def _bring_up(self, boot: Boot) -> None:
        try:
            await self._bring_up_guest(boot)
        except Exception as err:
            self._set_ended(UNKNOWN_EXIT_STATUS)
            if isinstance(err, BootFailed):
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
                await _set_policy(agent, policy, machine)
            await _answered(boot.network.tell(agent), machine)
            await _answered(agent.create_sandbox(self._create_sandbox_request()), machine)
            await boot.confine(machine)  # not before: the pod's CPU limit is not for the guest's boot
            self._resources = undo.pop_all()
        if not boot.config.hypervisor.confidential_guest:  # such a guest takes no time from the host
            self._clock = GuestClock(agent)
            self._in_background(self._clock.follow(), "follow the clock")
        self._sizing = Sizing(machine, agent, boot.config, self._in_background)
        self._inside = Guest(agent, machine.pid, self._liveness(agent, machine))
        self._in_background(self._watch_machine(machine), "watch machine")
        self._in_background(boot.network.follow(agent, machine), "follow the network")
        self._in_background(oom.watch(agent, self._containers), "watch for OOM")
        if wants_agent_log(boot.config):
            level = number_of(boot.config.agent.log_level)
            self._in_background(agent_log.forward(machine, boot.config.agent.log_port, level), "agent's log")
        boot.report()

    def _liveness(self, agent: AgentClient, machine: Machine) -> Liveness:
        config = self._boot.config
        return Liveness(
            agent,
            None if config.runtime.keep_abnormal else machine.stop,
            check_s=config.agent.health_check_request_timeout_ms / 1000,
        )

    def _create_sandbox_request(self) -> agent_pb2.CreateSandboxRequest:
        storages = [
            agent_pb2.Storage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                options=["noexec", "nosuid", "nodev", "mode=1777", f"size={self._boot.pod.shm_size}"],
                mount_point=f"{_SANDBOX_DIR}/shm",
            )
        ]
        qemu = self._boot.config.hypervisor
        if qemu.shared_fs != "none":
            driver, fstype, options = "virtio-fs", "virtiofs", ["nodev"]
            if qemu.virtio_fs_cache_size and qemu.virtio_fs_cache != "never":
                options.append("dax")
            if shares_by_9p(self._boot.config):
                driver = fstype = "9p"
                # With mmap it caches nothing but pages that are mapped: what the host changes is seen.
                how = ("trans=virtio", "version=9p2000.L", "cache=mmap", f"msize={qemu.msize_9p}")
                options = ["nodev", *how]
            share = agent_pb2.Storage(
                driver=driver, source=TAG, fstype=fstype, options=options, mount_point=f"{GUEST_ROOT}/"
            )
            storages.insert(0, share)
        words = [module.split() for module in self._boot.config.agent.kernel_modules]
        return agent_pb2.CreateSandboxRequest(
            hostname=self._boot.pod.hostname[:64],
            dns=self._boot.pod.dns,
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
        self._set_ended(UNKNOWN_EXIT_STATUS)

    def _set_ended(self, status: int) -> None:
        if not self.ended.done():
            self.ended.set_result(Exit(status, time.time_ns()))

    def _end_all(self) -> None:
        for container in self._containers.values():
            container.guest_died()


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


async def _set_policy(agent: AgentClient, policy: str, machine: Machine) -> None:
    """Let the agent enforce a policy from now on.

    Raises:
        NotSupported: it cannot.
        BootFailed, RpcError: as of any call.
    """
    try:
        await _answered(agent.set_policy(agent_pb2.SetPolicyRequest(policy=policy)), machine)
    except RpcError as err:
        if err.code is not Code.UNIMPLEMENTED:
            raise
        raise NotSupported(
            "policy of [agent.kata] is set, and the guest's agent enforces none; remove it, or use a guest that does"
        ) from err


async def _forget(agent: AgentClient, container_id: str) -> None:
    """Remove a container that the guest may yet finish making, when nobody here waits for it any more."""
    try:
        await agent.remove_container(agent_pb2.RemoveContainerRequest(container_id=container_id))
    except RpcError as err:
        log.warning("abandoned_container_not_removed", container=container_id, error=str(err))


def _container_type(bundle: Bundle) -> str:
    annotations = bundle.spec.annotations
    if bundle.sandbox_id != bundle.container_id:
        return "pod_container"
    in_pod = any(annotations.get(key) in ("sandbox", "podsandbox") for key, _ in paths.POD_ANNOTATIONS)
    return "pod_sandbox" if in_pod else "single_container"
