"""The creation of one container, step by step; every step leaves behind how to undo it.

What belongs to the host is done while the guest may still boot: the container's streams, its root file system, and
whatever it mounts. Then comes what needs a guest that is up, and as the last step the agent's call. Which containers
there are is `shim.sandbox`; how single mounts, disks, devices or hooks are dealt with is told in their own modules.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import structlog

from agent_proto.gen import agent_pb2
from shim import architecture, disk_needs, oci, paths, stand_in, volumes
from shim.agent import answered
from shim.aside import aside, aside_with_undo
from shim.bundle import Bundle
from shim.container import Container
from shim.container_events import ContainerEvents
from shim.errors import InvalidRequest
from shim.guest import GuestContainer
from shim.hooks import HostHooks
from shim.io import ProcessIO
from shim.share import guest_rootfs
from shim.sizing import demand_of
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from agent_proto.client import AgentClient
    from agent_proto.gen.oci_pb2 import Process as OciProcess
    from agent_proto.gen.oci_pb2 import Spec as OciSpec
    from shim.api.gen.types_pb2 import Mount as ProtoMount
    from shim.background import InBackground
    from shim.boot import Boot
    from shim.bring_up import RunningGuest
    from shim.disk_needs import Need, Needs
    from shim.disks import ContainerDisks
    from shim.events import Publisher
    from shim.io import Stdio
    from shim.layers import LayerDisks, Layers
    from shim.passthrough import Group
    from shim.share import SharedDir
    from shim.sizing import Demand
    from shim.volumes import Volumes

log = structlog.get_logger()


class CreateRequest(NamedTuple):
    """What `Task.Create` asks for."""

    container_id: str
    bundle: Path
    rootfs: Sequence[ProtoMount]
    stdio: Stdio


class Surroundings(NamedTuple):
    """What a sandbox has for all of its containers. `etc` are files of /etc for those that do not bring their own;
    `in_pod` says that there is a pod before its first container. `suit` sees to it that the machine runs a program
    of the container with that id, and `guest` waits for the guest to be up."""

    sandbox_id: str
    namespace: str
    in_pod: bool
    boot: Boot
    share: SharedDir
    etc: Mapping[str, Path]
    events: Publisher
    in_background: InBackground
    suit: Callable[[str, OciProcess], Awaitable[None]]
    guest: Callable[[], Awaitable[RunningGuest]]


class _Prepared(NamedTuple):
    """A container as far as the host alone can make it: what is left for the guest to do, and to have."""

    io: ProcessIO
    needs: Needs
    layers: LayerDisks | None
    demand: Demand
    swap_bytes: int
    volumes: Volumes
    joins_pidns: bool


class Creation:
    """One container on its way; `make` is called once. Raises InvalidRequest, NotSupported (its bundle), and what
    `PodDevices.wanted_by` does."""

    def __init__(self, request: CreateRequest, around: Surroundings) -> None:
        self._request = request
        self._around = around
        self._id = request.container_id
        self._what = f"container {request.container_id}"
        boot = around.boot
        bundle = boot.bundle
        if bundle is None or request.bundle != bundle.path:
            bundle = Bundle.load(request.container_id, request.bundle)
        self._bundle = bundle
        stand_in.put_in_place(bundle.path)
        self._spec = oci.spec_to_proto(bundle.raw, "config.json")
        oci.check(self._spec, swap=boot.config.hypervisor.enable_guest_swap)
        privileged = oci.allows_every_device(self._spec.Linux.Resources)
        self._devices: Sequence[Group] = boot.devices.wanted_by(self._spec, privileged=privileged)
        if boot.config.hypervisor.confidential_guest:
            raise InvalidRequest(
                f"{self._what}: its root file system cannot reach a confidential guest: no files are shared with it, "
                "and in this version images are pulled by the host; run it in a guest without confidential_guest"
            )

    async def make(self) -> Container:
        """Carry out all steps; when one fails, those before it are undone.

        Raises:
            InvalidRequest, GuestUnreachable, HookFailed, NetworkNotMirrored, HypervisorError, OSError (a mount),
            RpcError (the agent).
        """
        with ExitStack() as undo:
            prepared = await self._prepare(undo)
            running = await self._around.guest()
            async with AsyncExitStack() as undo_in_guest:
                container = await self._make_in_guest(prepared, running, undo, undo_in_guest)
                undo_in_guest.pop_all()
        ContainerEvents(self._around.events, self._id, running.machine.pid).created(self._request)
        return container

    async def _prepare(self, undo: ExitStack) -> _Prepared:
        """What is to be done on the host; the specification is the guest's after it."""
        around, boot, spec = self._around, self._around.boot, self._spec
        io = await ProcessIO.open(self._request.stdio, self._what, owner=self._id, namespace=around.namespace)
        undo.callback(io.abort)
        needs = disk_needs.devices_on_disks(spec, boot.config.hypervisor)
        rootfs, layers = await self._add_rootfs(needs, undo)
        await around.suit(self._id, spec.Process)
        swap_bytes = 0
        if boot.config.hypervisor.enable_guest_swap:
            from shim import guest_swap

            swap_bytes = guest_swap.wanted(spec, boot.config.hypervisor, self._what)
        demand = demand_of(spec.Linux.Resources, self._what)
        joins_pidns = oci.edit_for_guest(
            spec,
            rootfs=rootfs,
            container_type="pod_container" if around.in_pod else _container_type(self._bundle),
            bundle=str(self._bundle.path),
            keep_seccomp=not boot.config.runtime.disable_guest_seccomp,
            disks={(device.Major, device.Minor) for device in needs.devices},
        )
        if spec.Linux.HasField("Seccomp"):
            architecture.fit_seccomp(spec.Linux.Seccomp, boot.config.hypervisor.machine_type)
        boot.devices.edit(spec, self._devices)
        needs.name_devices_in(spec)
        _add_pod_settings(spec, around.etc, boot.pod.sysctls)
        mounted = await aside_with_undo(
            lambda own: volumes.reach(
                spec,
                self._bundle,
                needs,
                sandbox_id=around.sandbox_id,
                share=around.share,
                config=boot.config,
                undo=own,
            ),
            undo,
        )
        return _Prepared(io, needs, layers, demand, swap_bytes, mounted, joins_pidns)

    async def _make_in_guest(
        self, prepared: _Prepared, running: RunningGuest, undo: ExitStack, undo_in_guest: AsyncExitStack
    ) -> Container:
        """What needs the guest. `undo` outlives the creation: it is the container's when there is one."""
        around, boot, spec = self._around, self._around.boot, self._spec
        machine, share = running.machine, around.share
        await running.mirrors.stand_in(prepared.volumes.kubelets, running.guest, share, undo)
        undo.callback(running.sizing.forget, self._id)
        await running.sizing.make_room(self._id, prepared.demand)
        if prepared.swap_bytes:
            undo.callback(running.swap.forget, self._id)
            await running.swap.make_room(self._id, prepared.swap_bytes)
        if boot.config.runtime.proxy_host_sockets:
            await running.host_sockets.offer_mounted(spec, share, undo)
        message = agent_pb2.CreateContainerRequest(
            container_id=self._id,
            exec_id=self._id,
            storages=prepared.volumes.storages,
            sandbox_pidns=prepared.joins_pidns,
            shared_mounts=oci.shared_mounts(spec, boot.config.runtime.shared_mounts),
        )
        if self._devices:
            message.devices.extend(await boot.devices.give(self._id, self._devices, machine))
            undo_in_guest.callback(self._take_devices_back, running)
        hooks = HostHooks(self._bundle, machine.pid, share.host_mounts)
        undo_in_guest.push_async_callback(hooks.stopped)
        disks = None
        if prepared.needs.disks:
            disks = await running.disks.attach(prepared.needs.disks, message)
            undo_in_guest.push_async_callback(disks.release)
            if prepared.layers is not None:
                message.storages.extend(prepared.layers.storages())
        message.OCI.CopyFrom(spec)
        if await hooks.prepare():
            await running.network.catch_up(running.agent, machine)
        await running.names.serve_for(self._bundle, boot.pod)
        await hooks.create(running.network.netns)
        await self._call_agent(message, running, disks)
        return Container(
            self._id,
            self._bundle.path,
            guest=GuestContainer(running.guest, self._id),
            events=around.events,
            namespace=around.namespace,
            stdio=self._request.stdio,
            io=prepared.io,
            undo=undo.pop_all(),
            hooks=hooks,
            disks=disks,
            before_start=partial(_before_start, self._bundle, around, running),
        )

    async def _add_rootfs(self, needs: Needs, undo: ExitStack) -> tuple[str, LayerDisks | None]:
        """See to it that the guest finds the root file system, and return where; one on a disk it mounts itself, and
        one of layers it also puts together."""
        share, mounts, qemu = self._around.share, self._request.rootfs, self._around.boot.config.hypervisor
        mount_point = guest_rootfs(self._id)

        def look() -> tuple[Layers | None, bool, Need | None]:
            layers = None
            if mounts:
                from shim.layers import described

                layers = described(self._id, mounts, share.host_mounts)
            if layers is not None:
                return layers, qemu.disable_block_device_use or layers.written_on_host, None
            disk = disk_needs.rootfs_on_disk(self._id, mounts, mount_point, qemu, share.host_mounts)
            return None, False, disk

        layers, by_host, disk = await aside(look)
        if layers is not None and not by_host:
            from shim.layers import disks

            in_guest = disks(layers, qemu, mount_point)
            needs.disks.extend(in_guest.needs)
            return share.add_guests_rootfs(self._id, undo), in_guest
        if disk is not None:
            needs.disks.append(disk)
            return share.add_guests_rootfs(self._id, undo), None

        if layers is None:
            add = partial(share.add_rootfs, self._id, mounts, self._bundle.rootfs)
        else:
            from shim.layers import make_image

            await make_image(layers, share.host_mounts)
            add = partial(share.add_layers, self._id, layers)
        return await aside_with_undo(add, undo), None

    def _take_devices_back(self, running: RunningGuest) -> None:
        # The guest may take its time to let go of them, and nobody waits for that.
        taking = self._around.boot.devices.take_back(self._id, running.machine)
        self._around.in_background(taking, f"devices of {self._what}")

    async def _call_agent(
        self,
        message: agent_pb2.CreateContainerRequest,
        running: RunningGuest,
        disks: ContainerDisks | None,
    ) -> None:
        try:
            await answered(running.agent.create_container(message), running.machine)
            await running.divided()  # in here: who gives up now leaves a container in the guest as well
        except (RpcError, asyncio.CancelledError) as err:
            # Nobody waits for it any more, and the guest may make it all the same.
            if isinstance(err, asyncio.CancelledError) or err.code is Code.DEADLINE_EXCEEDED:
                self._around.in_background(_forget(running.agent, self._id), f"forget {self._what}")
            elif disks is not None and err.code is Code.INVALID_ARGUMENT:
                raise RpcError(err.code, disks.named(err.message)) from err
            raise


def _add_pod_settings(spec: OciSpec, etc: Mapping[str, Path], sysctls: Mapping[str, str]) -> None:
    """Give the container what the pod's first container brings where there is one: /etc files and sysctls."""
    mounted = {mount.destination for mount in spec.Mounts}
    access = "ro" if spec.Root.Readonly else "rw"
    for destination, file in etc.items():
        if destination not in mounted:
            options = ["rbind", "rprivate", access]
            spec.Mounts.add(destination=destination, type="bind", source=str(file), options=options)
    for name, value in sysctls.items():
        if name not in spec.Linux.Sysctl:
            spec.Linux.Sysctl[name] = value


async def _before_start(bundle: Bundle, around: Surroundings, running: RunningGuest) -> None:
    """Docker and nerdctl bring the network, and its name server, between Create and Start."""
    if bundle.container_id == around.sandbox_id:
        await running.network.catch_up(running.agent, running.machine)
    await running.names.serve_for(bundle, around.boot.pod)


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
