"""Devices of the host in a machine: those that it starts with, and those that come and go while it runs.

QEMU opens a group by itself. A device with a file of its own is opened here, and QEMU is given the descriptor together
with that of /dev/iommu: so it need not be root.

Loaded when a machine has such a device, or is to be given one.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING

from hypervisor.errors import DeviceUnavailable, HotplugRefused, InvalidSpec, QmpRefused
from hypervisor.qemu import commands
from hypervisor.qemu.args import Device, Props, join_props
from hypervisor.qemu.cmdline import RARE_TYPES
from hypervisor.qemu.ports import first_places, free_place, port_key
from hypervisor.vfio import IOMMU_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypervisor.arch import Arch
    from hypervisor.qemu import args
    from hypervisor.qemu.bridge import Place
    from hypervisor.qemu.qmp import Monitor
    from hypervisor.spec import VmSpec
    from hypervisor.vfio import HostDevice

_IOMMUFD = "iommufd0"
_MIB = 1 << 20
# What is mapped for devices beside memory; libvirt allows as much.
_MAPPED_REGISTERS_BYTES = 1 << 30
_REMEDY = "no other program may have it open, and all of its group has to be bound to vfio-pci; `kata-py check` looks"


class Hex(int):
    """A number that command lines show in hexadecimal digits."""

    def __str__(self) -> str:
        return hex(self)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Iommufd(Props):
    """`-object iommufd`: an open /dev/iommu, which all devices with files of their own share."""

    id: str
    fd: int

    def argv(self) -> list[str]:
        return ["-object", join_props("iommufd", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VfioDevice(Device):
    """A device of the host."""

    id: str
    sysfsdev: str | None = None

    def properties(self) -> dict[str, object]:
        """For the monitor's device_add, which takes driver and id apart."""
        words = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in words.items() if value is not None and name not in ("driver", "id")
        }


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VfioPci(VfioDevice):
    """A PCI device of the host. The guest reads the numbers of its maker and kind here, where some parts of a device
    do not tell them.
    """

    host: str | None
    bus: str
    addr: str | None
    iommufd: str | None
    fd: str | None
    x_pci_vendor_id: Hex | None
    x_pci_device_id: Hex | None


def switches(
    spec: VmSpec, arch: Arch, iommufd: int | None, files: Sequence[int | None]
) -> Iterator[args.Switch]:
    """The devices that the machine starts with. Their ports come before. Raises InvalidSpec."""
    if iommufd is not None:
        yield Iommufd(id=_IOMMUFD, fd=iommufd)
    places = iter(first_places(spec))
    for device, fd in zip(spec.host_devices, files, strict=True):
        _check(device, arch)
        if device.own_file is not None and (fd is None or iommufd is None):
            raise InvalidSpec(f"device {device.address} needs open files of its own and of {IOMMU_FILE}")
        place = None if device.kind == "ap" else next(places)
        yield _device(device, place, str(fd) if fd is not None else None)


def opened(devices: Sequence[HostDevice], undo: ExitStack) -> tuple[int | None, tuple[int | None, ...]]:
    """/dev/iommu, and the own files of the devices; `undo` closes our descriptors of them. Raises DeviceUnavailable."""
    files = tuple(_open(str(device.own_file), undo) if device.own_file else None for device in devices)
    shared = _open(IOMMU_FILE, undo) if any(fd is not None for fd in files) else None
    return shared, files


def locked_bytes(spec: VmSpec) -> int:
    """How much memory a QEMU without root's rights has to be allowed to lock: all that the guest may have, which
    devices read and write at any time. Behind a virtual IOMMU each device counts for itself.
    """
    devices = len(spec.host_devices) + spec.host_device_places
    memory = max(spec.memory_mib, spec.max_memory_mib) * _MIB
    return memory * (max(devices, 1) if spec.iommu else 1) + _MAPPED_REGISTERS_BYTES


class HostDevices:
    """The host's devices of a running machine."""

    def __init__(self, spec: VmSpec) -> None:
        self._spec = spec
        self._lock = asyncio.Lock()
        self._has_iommufd = any(device.own_file for device in spec.host_devices)

    async def plug(self, monitor: Monitor, device: HostDevice, arch: Arch) -> None:
        """Give the guest one more device. Raises HotplugRefused, DeviceUnavailable, HostUnsupported, QmpError."""
        _check(device, arch)
        async with self._lock:
            place = None
            if device.kind != "ap":
                place = free_place(self._spec, await commands.query_pci(monitor))
                if place is None:
                    raise HotplugRefused(self._no_place(device))
            await self._open_to_user(device)
            await self._add(monitor, device, place)

    async def unplug(self, monitor: Monitor, device: HostDevice) -> None:
        """Take a device back; nothing happens when it is not there. Raises HotplugRefused, QmpError."""
        # Its place is taken until it is gone: others look for another one meanwhile.
        await commands.unplug(monitor, device.id)

    def _no_place(self, device: HostDevice) -> str:
        kind = self._spec.host_device_port
        more = f"; set {key} to a greater number" if (key := port_key(kind)) else ""
        return (
            f"device {device.address} of the host cannot be plugged in: no {kind} of the guest is free{more}"
        )

    async def _open_to_user(self, device: HostDevice) -> None:
        """Raise HostUnsupported for a device that a QEMU that is not root cannot open."""
        if self._spec.user is None:
            return
        from hypervisor import rootless

        await rootless.require(self._spec.user, rootless.device_files([device]))

    async def _add(self, monitor: Monitor, device: HostDevice, place: Place | None) -> None:
        name: str | None = None
        try:
            if device.own_file is not None:
                with ExitStack() as ours:
                    shared, (own,) = opened([device], ours)
                    assert shared is not None
                    assert own is not None
                    if not self._has_iommufd:
                        await self._add_iommufd(monitor, shared)
                    await commands.getfd(monitor, device.id, own)
                    name = device.id
            made = _device(device, place, name)
            await commands.device_add(monitor, made.driver, made.id, made.properties())
        except QmpRefused as err:
            if name is not None:
                with suppress(QmpRefused):  # QEMU has taken it before it gave up
                    await commands.closefd(monitor, name)
            raise HotplugRefused(
                f"device {device.address} of the host ({device.file}) was not plugged in: {err}; {_REMEDY}"
            ) from err

    async def _add_iommufd(self, monitor: Monitor, fd: int) -> None:
        await commands.getfd(monitor, _IOMMUFD, fd)
        try:
            await commands.object_add(monitor, "iommufd", _IOMMUFD, {"fd": _IOMMUFD})
        except QmpRefused as err:
            await commands.closefd(monitor, _IOMMUFD)
            raise HotplugRefused(f"devices with files of their own: {err}; {RARE_TYPES['iommufd']}") from err
        self._has_iommufd = True


def blamed(said: Sequence[str], argv: Sequence[str], devices: Sequence[HostDevice]) -> str:
    """Which device QEMU has ended for, by the argument that it names before its reason: one line, or nothing."""
    for value in (
        value for switch, value in pairwise(argv) if switch == "-device" and value.startswith("vfio-")
    ):
        device = next((device for device in devices if f",id={device.id}," in f"{value},"), None)
        for line in said:
            _, found, reason = line.partition(f"-device {value}: ")
            if found and device is not None:
                return f"QEMU cannot open device {device.address} of the host ({device.file}): {reason}; {_REMEDY}"
    return ""


def _check(device: HostDevice, arch: Arch) -> None:
    if device.kind == "ap" and arch.name != "s390x":
        raise InvalidSpec(f"{device.address} is of crypto adapters, which {arch.name} guests do not have")
    if device.kind != "ap" and not arch.pcie_ports:
        raise InvalidSpec(
            f"{arch.name} guests are given no PCI devices of the host, as {device.address} is one"
        )


def _device(device: HostDevice, place: Place | None, fd: str | None) -> VfioDevice:
    if place is None:
        return VfioDevice(driver="vfio-ap", id=device.id, sysfsdev=device.sysfs)
    by_group = device.kind == "pci" and fd is None
    return VfioPci(
        driver="vfio-pci",
        id=device.id,
        sysfsdev=device.sysfs if device.kind == "mediated" else None,
        host=device.address if by_group else None,
        bus=place.bus,
        addr=hex(place.slot) if place.slot else None,
        iommufd=_IOMMUFD if fd is not None else None,
        fd=fd,
        x_pci_vendor_id=_hex(device.vendor),
        x_pci_device_id=_hex(device.device),
    )


def _hex(number: int | None) -> Hex | None:
    return Hex(number) if number is not None else None


def _open(path: str, undo: ExitStack) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as err:
        raise DeviceUnavailable(f"cannot open {path}: {err.strerror}; {_REMEDY}") from err
    undo.callback(os.close, fd)
    return fd
