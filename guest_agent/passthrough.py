"""Devices of the host in this guest: waited for, and given to a container as its specification asks for them.

The host names a PCI device by the slots on the way to it, from the root bus on: numbers of buses are the guest's own.
Either this guest's kernel drives the device and the container finds what the driver makes of it (`vfio-pci-gk`), or the
container's own program drives it, through the guest's VFIO (`vfio-pci`). Loaded when a container has such a device.
"""

from __future__ import annotations

import os
import stat
from functools import partial
from typing import TYPE_CHECKING

from guest_agent.errors import InvalidRequest
from guest_agent.hardware import HardwareFinder, names_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent_proto.gen import agent_pb2, oci_pb2

#: Kinds of devices, by Kata's names of them (Device.type).
DRIVEN_BY_KERNEL, DRIVEN_BY_CONTAINER = "vfio-pci-gk", "vfio-pci"
QUEUES = ("vfio-ap", "vfio-ap-cold")
_VFIO_MODULES = ("vfio_iommu_type1", "vfio_pci")
_QUEUE_MODULES = ("zcrypt_cex4",)
#: Where programs reach all crypto queues of the guest.
_QUEUES_FILE = "/dev/z90crypt"
_VFIO_DIR = "/dev/vfio/"
_VFIO_CONTROL = "/dev/vfio/vfio"
_HEX = frozenset("0123456789abcdef")
#: As deep as buses may be nested; QEMU's machines have two or three.
_MOST_SLOTS = 8
#: Numbers from which on root buses of expanders have theirs, as Kata's runtime gives them.
_FIRST_EXPANDER = 0x20
#: How device plugins tell containers of addresses: PCIDEVICE_<resource>=<address>,...
_ADDRESS_VARIABLE = "PCIDEVICE_"


class PciDevice:
    """A device of the guest: its address, and its directory in sysfs."""

    def __init__(self, address: str, directory: str) -> None:
        self.address = address
        self.directory = directory


class Finder(HardwareFinder):
    """Looks for devices, each for `patience_s` seconds at most. `load` loads a kernel module that is not built in."""

    async def find(self, path: str) -> PciDevice:
        """The PCI device with this path. Raises InvalidRequest, NotFound when it does not come."""
        if not _is_path(path):
            raise InvalidRequest(f"{path!r} is no path of a PCI device")
        await self.until(lambda: self._there(path) is not None, f"PCI device {path}")
        found = self._there(path)
        assert found is not None
        return found

    async def queues(self, names: Iterable[str]) -> os.stat_result:
        """The file that reaches the crypto queues, once all are there. Raises InvalidRequest, NotFound, OSError."""
        for module in _QUEUE_MODULES:
            self._load(module)
        for name in names:
            if not _is_hex(name, ".", 2, 4):
                raise InvalidRequest(f"{name!r} is no crypto queue: ADAPTER.DOMAIN, as 05.0004")
            await self.until(
                partial(os.path.exists, f"{self._sys}/bus/ap/devices/{name}"), f"crypto queue {name}"
            )
        return os.stat(self._dev + _QUEUES_FILE.removeprefix("/dev"))

    async def bind(self, device: PciDevice) -> str:
        """Give the device to the guest's VFIO; the answer is its group. Raises InvalidRequest, NotFound, OSError."""
        for module in _VFIO_MODULES:
            self._load(module)
        group = _link(f"{device.directory}/iommu_group")
        if not group:
            raise InvalidRequest(
                f"PCI device {device.address} of the guest is in no IOMMU group, so no container can drive it; set "
                'enable_iommu = true, or vfio_mode to "guest-kernel"'
            )
        driver = f"{device.directory}/driver"
        if _link(driver) != "vfio-pci":
            _write(f"{device.directory}/driver_override", "vfio-pci")
            if os.path.exists(driver):
                _write(f"{driver}/unbind", device.address)
            _write(f"{self._sys}/bus/pci/drivers_probe", device.address)
            if _link(driver) != "vfio-pci":
                raise InvalidRequest(f"PCI device {device.address} of the guest cannot be bound to vfio-pci")
        await self.until(lambda: os.path.exists(f"{self._dev}/vfio/{group}"), f"{_VFIO_DIR}{group}")
        return group

    def stat(self, path: str) -> os.stat_result:
        """Of a device file. Raises OSError."""
        return os.stat(self._dev + path.removeprefix("/dev"))

    def _there(self, path: str) -> PciDevice | None:
        """The device if it is there by now: from one bus to the next, by the number that the guest gave it."""
        slots = path.split("/")
        number = "00"
        if len(slots) > 2 and int(slots[0][:2], 16) >= _FIRST_EXPANDER:
            number = slots.pop(0)
        directory, bus = self.root_bus(f"pci0000:{number}"), f"0000:{number}"
        if directory is None:
            return None
        found: PciDevice | None = None
        for slot in slots:
            if found is not None:
                buses = names_in(f"{found.directory}/pci_bus")
                if not buses:
                    return None
                directory, bus = found.directory, buses[0]
            address = f"{bus}:{slot if '.' in slot else f'{slot}.0'}"
            found = PciDevice(address, f"{directory}/{address}")
            if not os.path.isdir(found.directory):
                return None
        return found


async def hand_out(request: agent_pb2.CreateContainerRequest, finder: Finder) -> None:
    """Wait for the devices of the request that come from the host, let the container's specification name what it gets
    of them, and take them off the request's list. Raises InvalidRequest, NotFound, OSError.
    """
    others: list[agent_pb2.Device] = []
    addresses: dict[str, str] = {}
    for device in request.devices:
        if device.type in (DRIVEN_BY_KERNEL, DRIVEN_BY_CONTAINER):
            found = {host: await finder.find(path) for host, path in _options(device)}
            addresses |= {host: pci.address for host, pci in found.items()}
            if device.type == DRIVEN_BY_CONTAINER:
                await _give_group(request.OCI, device, list(found.values()), finder)
            else:
                _drop(request.OCI, device.container_path)
        elif device.type in QUEUES:
            info = await finder.queues(device.options)
            _name_in(request.OCI, device.container_path, _QUEUES_FILE, info)
        else:
            others.append(device)
    _tell_addresses(request.OCI, addresses)
    del request.devices[:]
    request.devices.extend(others)


def _options(device: agent_pb2.Device) -> Iterator[tuple[str, str]]:
    """Each "address on the host=path in the guest"."""
    for option in device.options:
        host, separator, path = option.partition("=")
        if not separator or not _is_address(host.lower()):
            raise InvalidRequest(f"{device.type} device {device.id}: {option!r} is not ADDRESS=PATH")
        yield host.lower(), path


async def _give_group(
    spec: oci_pb2.Spec, device: agent_pb2.Device, members: list[PciDevice], finder: Finder
) -> None:
    groups = {await finder.bind(member) for member in members}
    if len(groups) != 1:
        raise InvalidRequest(
            f"{device.type} device {device.id} is of {len(groups)} IOMMU groups of the guest, and is one of the host's"
        )
    path = _VFIO_DIR + groups.pop()
    _name_in(spec, device.container_path, path, finder.stat(path))
    _name_in(spec, _VFIO_CONTROL, _VFIO_CONTROL, finder.stat(_VFIO_CONTROL))


def _name_in(spec: oci_pb2.Spec, wanted: str, path: str, info: os.stat_result) -> None:
    """Put a device file of the guest in the place of the one that was wanted."""
    if not stat.S_ISCHR(info.st_mode):
        raise InvalidRequest(f"{path} of the guest is not a character device")
    devices = spec.Linux.Devices
    entry = next((entry for entry in devices if entry.Path in (wanted, path)), None)
    if entry is None:
        entry = devices.add(FileMode=0o660)
    entry.Path, entry.Type = path, "c"
    entry.Major, entry.Minor = os.major(info.st_rdev), os.minor(info.st_rdev)


def _drop(spec: oci_pb2.Spec, path: str) -> None:
    kept = [entry for entry in spec.Linux.Devices if entry.Path not in (path, _VFIO_CONTROL)]
    del spec.Linux.Devices[:]
    spec.Linux.Devices.extend(kept)


def _tell_addresses(spec: oci_pb2.Spec, addresses: dict[str, str]) -> None:
    """Put the guest's addresses in place of the host's, where a device plugin tells them."""
    for index, variable in enumerate(spec.Process.Env):
        name, _, value = variable.partition("=")
        if addresses and name.startswith(_ADDRESS_VARIABLE):
            words = (addresses.get(word.strip().lower(), word) for word in value.split(","))
            spec.Process.Env[index] = f"{name}={','.join(words)}"


def _is_path(path: str) -> bool:
    slots = path.split("/")
    return len(slots) <= _MOST_SLOTS and all(_is_slot(slot) for slot in slots)


def _is_slot(text: str) -> bool:
    """`02`, or with a function `02.1`."""
    slot, separator, function = text.partition(".")
    return _is_hex(slot, "", 2) and (not separator or (len(function) == 1 and function in "01234567"))


def _is_address(text: str) -> bool:
    """`0000:3b:00.1`, the first part of which may be missing."""
    *domain, bus, slot = text.split(":") if text.count(":") in (1, 2) else ("", "", "")
    has_function = "." in slot
    return (
        all(_is_hex(part, "", 4) for part in domain)
        and _is_hex(bus, "", 2)
        and has_function
        and _is_slot(slot)
    )


def _is_hex(text: str, separator: str, *sizes: int) -> bool:
    """Whether it is hexadecimal numbers of so many digits."""
    parts = text.split(separator) if separator else [text]
    return list(map(len, parts)) == list(sizes) and _HEX.issuperset("".join(parts))


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError as err:
        raise OSError(err.errno, f"{path}: {err.strerror}") from err


def _link(path: str) -> str:
    """The last part of where a link points to; empty when there is none."""
    try:
        return os.readlink(path).rpartition("/")[2]
    except OSError:
        return ""
