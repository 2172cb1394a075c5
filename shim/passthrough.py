"""The host's devices of a pod (VFIO): what its machine starts with, what is plugged in later, and who has what.

A container asks for devices by their files in its specification or by annotations of CDI. For a pod of Kubernetes the
kubelet knows before the first container what all of them will ask for, so its machine can start with these devices.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import structlog

from hypervisor.errors import HotplugRefused, HypervisorError
from hypervisor.host import Host
from hypervisor.vfio import devices_named, is_pci_address, names_host_device
from shim import cdi
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from agent_proto.gen import agent_pb2, oci_pb2
    from config import Config
    from hypervisor.qemu.machine import Machine
    from hypervisor.vfio import HostDevice
    from shim.bundle import Bundle
    from shim.pod import Pod

log = structlog.get_logger()

_FOLDER = "/dev/vfio/"
_IOMMU_FILE = "/dev/iommu"


class Group(NamedTuple):
    """What one name stands for: `file` is the container's name of it."""

    file: str
    devices: tuple[HostDevice, ...]


class _Held:
    """A device that the guest has. One from its start stays until its end."""

    def __init__(self, device: HostDevice, *, from_start: bool) -> None:
        self.device = device
        self.from_start = from_start
        self.users: set[str] = set()


class PodDevices:
    """All of the host's devices that a pod's guest has. `host` and `cdi_folders` are this host's unless given."""

    def __init__(
        self, config: Config, *, host: Host | None = None, cdi_folders: Sequence[Path] = cdi.FOLDERS
    ) -> None:
        qemu = config.hypervisor
        self._starts_with = qemu.cold_plug_vfio != "no-port"
        self._plugs_in = qemu.hot_plug_vfio != "no-port"
        self._confidential = qemu.confidential_guest
        self._driven_by_container = config.runtime.vfio_mode == "vfio"
        self._kubelet = config.runtime.pod_resource_api_sock
        self._host = host or Host()
        self._cdi_folders = cdi_folders
        self._held: dict[str, _Held] = {}
        # One for each device: a guest that does not let go of one delays nobody who wants another.
        self._locks: dict[str, asyncio.Lock] = {}

    async def at_start(self, pod: Pod, bundle: Bundle | None) -> tuple[HostDevice, ...]:
        """What the machine is to start with: what the pod's first container, its annotations and the kubelet name.

        Raises DevicesUnknown, DeviceUnavailable, InvalidSpec.
        """
        if not self._starts_with:
            return ()
        paths = [device.path for device in bundle.spec.host_devices] if bundle is not None else []
        names = [*filter(names_host_device, paths), *self._named_by_annotations(pod.annotations)]
        if self._kubelet:
            names += await self._named_by_kubelet(pod)
        devices = {device.id: device for name in dict.fromkeys(names) for device in self._group(name).devices}
        self._held = {name: _Held(device, from_start=True) for name, device in devices.items()}
        if devices:
            log.info("host_devices_at_start", devices=[device.address for device in devices.values()])
        return tuple(devices.values())

    def wanted_by(self, spec: oci_pb2.Spec, *, privileged: bool) -> list[Group]:
        """What a container asks for. A privileged one has all of the host's files in its specification, which stand for
        the guest's: only annotations count.

        Raises InvalidRequest, DevicesUnknown, DeviceUnavailable, InvalidSpec.
        """
        paths = [] if privileged else [device.Path for device in spec.Linux.Devices]
        files = [*filter(names_host_device, paths)]
        if not self._starts_with and not self._plugs_in:
            if files:
                raise InvalidRequest(
                    f"device {files[0]} cannot be given to a guest: set hot_plug_vfio or cold_plug_vfio in "
                    '[hypervisor.qemu], for example to "root-port", or run the container without it'
                )
            return []
        names = dict.fromkeys((*files, *self._named_by_annotations(spec.Annotations)))
        return [self._group(name) for name in names]

    async def give(
        self, container_id: str, wanted: Sequence[Group], machine: Machine
    ) -> list[agent_pb2.Device]:
        """Let the guest have what the container asks for; the answer tells its agent of it. `take_back` is the end.

        Raises InvalidRequest, HypervisorError.
        """
        try:
            for group in wanted:
                for device in group.devices:
                    async with self._lock(device.id):
                        await self._plug_in(container_id, group, device, machine)
            return [await self._described(group, machine) for group in wanted]
        except BaseException:
            await self.take_back(container_id, machine)
            raise

    async def take_back(self, container_id: str, machine: Machine) -> None:
        """The container is gone: what was plugged in for it alone leaves the guest."""
        mine = [device_id for device_id, held in self._held.items() if container_id in held.users]
        for device_id in mine:
            async with self._lock(device_id):
                await self._take_back(container_id, device_id, machine)

    def edit(self, spec: oci_pb2.Spec, wanted: Sequence[Group]) -> None:
        """Leave of the host's files what the guest's agent is to replace with its own."""
        mine = {group.file for group in wanted} if self._driven_by_container else set()
        kept = [
            entry
            for entry in spec.Linux.Devices
            if entry.Path in mine or not entry.Path.startswith((_FOLDER, _IOMMU_FILE))
        ]
        del spec.Linux.Devices[:]
        spec.Linux.Devices.extend(kept)
        for file in sorted(mine - {entry.Path for entry in kept}):
            spec.Linux.Devices.add(Path=file, Type="c", FileMode=0o660)

    def _lock(self, device_id: str) -> asyncio.Lock:
        return self._locks.setdefault(device_id, asyncio.Lock())

    async def _plug_in(self, container_id: str, group: Group, device: HostDevice, machine: Machine) -> None:
        held = self._held.get(device.id)
        if held is None:
            if not self._plugs_in:
                raise InvalidRequest(
                    f"device {group.file} ({device.address}) was not known when the virtual machine started, and "
                    "none is plugged in later; set hot_plug_vfio, or pod_resource_api_sock to let the kubelet tell"
                )
            # Known before it is there: who is cancelled in between has it taken back.
            held = self._held[device.id] = _Held(device, from_start=False)
            held.users.add(container_id)
            try:
                await machine.plug_host_device(device)
            except HypervisorError:
                del self._held[device.id]
                raise
            log.info("host_device_plugged", device=device.address, container=container_id)
        held.users.add(container_id)

    async def _take_back(self, container_id: str, device_id: str, machine: Machine) -> None:
        held = self._held.get(device_id)
        if held is None or container_id not in held.users:
            return  # somebody else was faster
        held.users.discard(container_id)
        if held.users or held.from_start or machine.exited.done():
            return
        try:
            await machine.unplug_host_device(held.device)
        except HypervisorError as err:
            # It stays the guest's, and a container that asks for it again finds it there.
            log.warning("host_device_not_unplugged", device=held.device.address, error=str(err))
            return
        del self._held[device_id]
        log.info("host_device_unplugged", device=held.device.address, container=container_id)

    async def _described(self, group: Group, machine: Machine) -> agent_pb2.Device:
        from agent_proto.gen import agent_pb2

        first = group.devices[0]
        if first.kind == "ap":
            kind = "vfio-ap-cold" if self._held[first.id].from_start else "vfio-ap"
            options = [queue for device in group.devices for queue in device.queues]
        else:
            kind = "vfio-pci" if self._driven_by_container else "vfio-pci-gk"
            options = [f"{device.tells}={await _path(device, machine)}" for device in group.devices]
        return agent_pb2.Device(id=first.group, type=kind, container_path=group.file, options=options)

    def _group(self, name: str) -> Group:
        if self._confidential:
            from hypervisor.confidential import check_vfio_device

            check_vfio_device(Path(name))
        devices = devices_named(name, self._host, by_own_file=self._confidential)
        return Group(name if name.startswith(_FOLDER) else str(devices[0].file), devices)

    def _named_by_annotations(self, annotations: Mapping[str, str]) -> Iterator[str]:
        names = cdi.names_in(annotations)
        if names:
            registry = cdi.Registry(self._cdi_folders)
            for name in names:
                yield from _host_devices(name, registry.files_of(name))

    async def _named_by_kubelet(self, pod: Pod) -> list[str]:
        from shim.kubelet import resources_of

        given = await resources_of(pod, self._kubelet)
        registry = cdi.Registry(self._cdi_folders)
        names: list[str] = []
        for name in given.claims:
            names += _host_devices(name, registry.files_of(name))
        for resource, device_id in given.plugins:
            name = f"{resource}={device_id}"
            if registry.knows(name):
                names += _host_devices(name, registry.files_of(name))
            elif is_pci_address(device_id):
                names.append(device_id)
            else:
                log.info("kubelets_device_not_of_vfio", pod=f"{pod.namespace}/{pod.name}", device=name)
        return names


async def _path(device: HostDevice, machine: Machine) -> str:
    path = await machine.pci_path(device.id)
    if path is None:
        raise HotplugRefused(f"QEMU has no device {device.id}, which it was given; create the pod anew")
    return path


def _host_devices(name: str, files: Iterable[str]) -> list[str]:
    found = [file for file in files if names_host_device(file)]
    if not found:
        log.info("cdi_device_not_of_vfio", device=name)
    return found
