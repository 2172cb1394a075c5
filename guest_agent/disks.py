"""Finding the disks that the host plugs in: from their address on a bus to the kernel's name of them.

The host asks for a disk the moment it has plugged it in, and the guest's kernel may need a while to see it: nobody
looks again before the kernel has announced something.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from guest_agent import syscalls
from guest_agent.errors import InvalidRequest
from guest_agent.hardware import HardwareFinder, names_in

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent_proto.gen import agent_pb2, oci_pb2

#: Kinds of addresses, by Kata's names of them, and the modules that such a disk needs.
_MODULES = {"blk": ("virtio_blk",), "blk-ccw": ("virtio_blk",), "scsi": ("virtio_scsi", "sd_mod")}
#: Values of Device.type, and those of Storage.driver that may have such an address as their source.
DRIVERS = tuple(_MODULES)
#: PCI has no more buses than that below each other that make sense.
_MAX_DEPTH = 8
_HEX = frozenset("0123456789abcdef")
#: The file of a SCSI host that makes it look for new units: channel, target, unit.
_SCSI_HOSTS = "class/scsi_host"


class Finder(HardwareFinder):
    """Looks for disks, each for `patience_s` seconds at most. `load` loads a kernel module that is not built in."""

    async def find(self, driver: str, address: str) -> str:
        """The device file of a disk. Raises InvalidRequest, NotFound when it does not come, OSError."""
        if not _is_address(driver, address):
            raise InvalidRequest(f"{address!r} is no address of a {driver} disk")
        for module in _MODULES[driver]:
            self._load(module)
        if driver == "scsi":
            self._scan(address)
        await self.until(lambda: self._there(driver, address) is not None, f"{driver} disk {address}")
        path = self._there(driver, address)
        assert path is not None
        return path

    def _there(self, driver: str, address: str) -> str | None:
        """The disk's device file, if it is there by now."""
        directory: str | None
        if driver == "scsi":
            directory = self._scsi(address)
        elif driver == "blk-ccw":
            directory = f"{self._sys}/bus/ccw/devices/{address}"
        else:
            directory = self._pci(address)
        name = _disk_below(directory) if directory is not None else None
        path = f"{self._dev}/{name}"
        return path if name is not None and os.path.exists(path) else None

    def _pci(self, address: str) -> str | None:
        """The directory of a PCI function 0: its slot on each bus from the root."""
        directory = self.root_bus("pci0000:00")
        for slot in address.split("/"):
            ending = f":{slot}.0"
            names = names_in(directory) if directory is not None else []
            found = next((name for name in names if name.endswith(ending) and name.count(":") == 2), None)
            if found is None:
                return None
            directory = f"{directory}/{found}"
        return directory

    def _scsi(self, address: str) -> str | None:
        units = f"{self._sys}/class/scsi_device"
        return next(
            (
                f"{units}/{name}/device"
                for name in names_in(units)
                if name.split(":", 2)[1:] == ["0", address]
            ),
            None,
        )

    def _scan(self, address: str) -> None:
        """A host whose driver has been loaded just now has not heard of units that came before."""
        hosts = f"{self._sys}/{_SCSI_HOSTS}"
        target, unit = address.split(":")
        for name in names_in(hosts):
            with open(f"{hosts}/{name}/scan", "w") as file:
                file.write(f"0 {target} {unit}")


def swap_on(path: str) -> None:
    """Swap to a disk that the host has prepared for that. Raises InvalidRequest."""
    try:
        syscalls.swapon(path, syscalls.SWAP_FLAG_DISCARD)
    except OSError as err:
        raise InvalidRequest(
            f"the guest cannot swap to {path}: {err.strerror}; see that it is a disk prepared for swap"
        ) from err


async def locate(storages: Iterable[agent_pb2.Storage], finder: Finder) -> None:
    """Put the device files of disks in place of their addresses. Raises as `find` does."""
    for storage in storages:
        if storage.driver in DRIVERS and not storage.source.startswith("/dev/"):
            storage.source = await finder.find(storage.driver, storage.source)
            # Disks with the rest of the file system (erofs).
            for index, option in enumerate(storage.options):
                name, _, address = option.partition("=")
                if name == "device" and not address.startswith("/dev/"):
                    storage.options[index] = f"device={await finder.find(storage.driver, address)}"


async def hand_out(request: agent_pb2.CreateContainerRequest, finder: Finder) -> None:
    """Let the container's specification name the guest's numbers of its disks, and take these off the request's list of
    devices. Raises as `find` does, and InvalidRequest for a disk without a path in the container.
    """
    others = []
    numbers: dict[tuple[int, int], tuple[int, int]] = {}
    for device in request.devices:
        if device.type not in DRIVERS:
            others.append(device)
            continue
        if not device.container_path.startswith("/"):
            raise InvalidRequest(
                f"{device.type} disk {device.id}: {device.container_path!r} is not an absolute path"
            )
        path = device.vm_path or await finder.find(device.type, device.id)
        hosts, guests = _name_in(request.OCI, device.container_path, path)
        numbers[hosts] = guests
    _renumber(request.OCI.Linux.Resources, numbers)
    del request.devices[:]
    request.devices.extend(others)


def _name_in(spec: oci_pb2.Spec, container_path: str, path: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the host's numbers and the guest's."""
    info = os.stat(path)
    if not stat.S_ISBLK(info.st_mode):
        raise InvalidRequest(f"{path} for {container_path} is not a block device")
    linux = spec.Linux
    entry = next((device for device in linux.Devices if device.Path == container_path), None)
    if entry is None:
        entry = linux.Devices.add(Path=container_path, FileMode=0o660)
    hosts = (entry.Major, entry.Minor)
    entry.Type, entry.Major, entry.Minor = "b", os.major(info.st_rdev), os.minor(info.st_rdev)
    return hosts, (entry.Major, entry.Minor)


def _renumber(resources: oci_pb2.LinuxResources, numbers: dict[tuple[int, int], tuple[int, int]]) -> None:
    """What is said of the host's disks, as of the guest's. All at once: a number may be both one's and the other's."""
    for rule in resources.Devices:
        if rule.Type == "b":
            rule.Major, rule.Minor = numbers.get((rule.Major, rule.Minor), (rule.Major, rule.Minor))
    if resources.HasField("BlockIO"):
        io = resources.BlockIO
        for limits in (
            io.ThrottleReadBpsDevice, io.ThrottleWriteBpsDevice, io.ThrottleReadIOPSDevice, io.ThrottleWriteIOPSDevice,
        ):  # fmt: skip
            for limit in limits:
                limit.Major, limit.Minor = numbers.get((limit.Major, limit.Minor), (limit.Major, limit.Minor))


def _is_address(driver: str, address: str) -> bool:
    """Whether it looks like `1e/02`, `0.0.1000` or `0:3`: it becomes part of paths."""
    if driver == "blk":
        slots = address.split("/")
        return len(slots) <= _MAX_DEPTH and all(len(slot) == 2 and _HEX.issuperset(slot) for slot in slots)
    if driver == "blk-ccw":
        parts = address.split(".")
        return len(parts) == 3 and all(part and _HEX.issuperset(part) for part in parts)
    target, colon, unit = address.partition(":")
    return bool(colon) and all(part.isascii() and part.isdecimal() for part in (target, unit))


def _disk_below(directory: str) -> str | None:
    """The disk of a SCSI unit, or of a virtio device below its bus's device."""
    virtio = (f"{directory}/{name}" for name in names_in(directory) if name.startswith("virtio"))
    for place in (directory, *virtio):
        for name in names_in(f"{place}/block"):
            return name
    return None
