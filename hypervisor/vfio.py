"""Devices of the host that a guest is given (VFIO): found by what names them, and looked at through sysfs.

A device is named by the file of its IOMMU group (`/dev/vfio/12`), by its own file (`/dev/vfio/devices/vfio0`), by its
PCI address, or by its folder in sysfs. A group is given as a whole, since its devices reach each other's memory;
bridges in it stay the host's. Nothing here changes anything: a device that is not ready is an error that says how to
make it so.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from hypervisor.errors import DeviceUnavailable

if TYPE_CHECKING:
    from hypervisor.host import Host

HostDeviceKind = Literal["pci", "mediated", "ap"]
PortKind = Literal["root-port", "switch-port", "bridge-port"]

#: Files below /dev/vfio that are no devices: they serve all of them.
CONTROL_FILES = frozenset({"/dev/vfio/vfio", "/dev/iommu"})
IOMMU_FILE = "/dev/iommu"
_GROUP = re.compile(r"/dev/vfio/([0-9]+)")
_UNPROTECTED_GROUP = re.compile(r"/dev/vfio/noiommu-[0-9]+")
_OWN_FILE = re.compile(r"/dev/vfio/devices/(vfio[0-9]+)")
_PCI_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-1][0-9a-f]\.[0-7])", re.IGNORECASE)
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
# Some devices have drivers of their own for this, which add to vfio-pci and are named after it: mlx5_vfio_pci.
_VFIO_DRIVER = re.compile(r".*vfio[-_]pci")
_BRIDGES = 0x06  # PCI's base class of bridges
# By what the kernel calls a mediated device's interface (`mdev_type/device_api`).
_MEDIATED: dict[str, HostDeviceKind] = {"vfio-pci": "mediated", "vfio-ap": "ap"}


@dataclass(frozen=True, kw_only=True)
class HostDevice:
    """A device that is ready to be given away."""

    kind: HostDeviceKind
    """`mediated` is a part of a PCI device that its driver has cut out, `ap` a set of a mainframe's crypto queues."""
    address: str
    """The PCI address, or the UUID of one that is made by a driver."""
    group: str
    """Number of its IOMMU group; the name of its own file when it is opened by that."""
    own_file: Path | None = None
    """What it is opened by, through IOMMUFD; None when QEMU opens its group."""
    vendor: int | None = None
    device: int | None = None
    device_class: int | None = None
    parent: str = ""
    """Of `mediated`: the address of the device that it is a part of."""
    queues: tuple[str, ...] = ()
    """Of `ap`: adapters and domains, as `05.0004`."""

    @property
    def id(self) -> str:
        """QEMU's name for it."""
        return f"vfio-{self.address.replace(':', '-')}"

    @property
    def tells(self) -> str:
        """The address by which the host's programs know it."""
        return self.parent or self.address

    @property
    def sysfs(self) -> str:
        """Its folder."""
        bus = "pci" if self.kind == "pci" else "mdev"
        return f"/sys/bus/{bus}/devices/{self.address}"

    @property
    def file(self) -> Path:
        """What opens it, directly or with its group."""
        return self.own_file or Path(f"/dev/vfio/{self.group}")


def names_host_device(path: str) -> bool:
    """Whether a device file stands for devices that can be given away."""
    return path.startswith("/dev/vfio/") and path not in CONTROL_FILES


def is_pci_address(text: str) -> bool:
    """Whether it names a PCI device, by its domain too."""
    match = _PCI_ADDRESS.fullmatch(text)
    return match is not None and match[1] is not None


def devices_named(name: str, host: Host, *, by_own_file: bool = False) -> tuple[HostDevice, ...]:
    """All devices that `name` stands for. `by_own_file` opens those through IOMMUFD that are not named by their group.

    Raises DeviceUnavailable: there is no such thing, or it is not ready; one line with what makes it so.
    """
    if match := _GROUP.fullmatch(name):
        return _of_group(name, match[1], host)
    if match := _OWN_FILE.fullmatch(name):
        return (_of_own_file(name, match[1], host),)
    if _UNPROTECTED_GROUP.fullmatch(name):
        raise DeviceUnavailable(
            f"{name}: without an IOMMU a guest's device could reach all of the host's memory; enable the IOMMU in the "
            "firmware and the kernel (intel_iommu=on), and bind the device again"
        )
    last = name.removesuffix("/").rpartition("/")[2] if name.startswith("/sys/") else name
    if match := _PCI_ADDRESS.fullmatch(last):
        return _of_address(name, f"{match[1] or '0000'}:{match[2]}".lower(), host, by_own_file)
    if _UUID.fullmatch(last):
        return (_mediated(name, last.lower(), host),)
    raise DeviceUnavailable(
        f"{name} names no device of the host; it is /dev/vfio/GROUP, /dev/vfio/devices/vfioN, a PCI address or a UUID"
    )


def has_iommufd(host: Host) -> bool:
    """Whether devices can be opened one by one (Linux 6.6 and later, with the module iommufd)."""
    return (host.root / IOMMU_FILE.lstrip("/")).exists()


def _of_group(name: str, group: str, host: Host) -> tuple[HostDevice, ...]:
    members = _members(name, group, host)
    found = tuple(
        device for address in members if (device := _member(name, address, group, host)) is not None
    )
    if not found:
        raise DeviceUnavailable(f"{name}: there are only bridges in this IOMMU group, which stay the host's")
    _require_file(name, Path(f"/dev/vfio/{group}"), host)
    return found


def _of_own_file(name: str, entry: str, host: Host) -> HostDevice:
    link = host.root / "sys/class/vfio-dev" / entry / "device"
    try:
        address = link.resolve(strict=True).name
    except OSError as err:
        raise DeviceUnavailable(
            f"{name}: no device is bound to it; bind one to vfio-pci ({_bind('ADDRESS')}), on Linux 6.6 or later"
        ) from err
    group = _group_of(name, address, host)
    for other in _members(name, group, host):
        _member(name, other, group, host)  # all of it has to be out of the host's hands
    if (device := _member(name, address, group, host)) is None:
        raise DeviceUnavailable(f"{name} is a bridge, and these stay the host's")
    return _by_own_file(device, entry, host)


def _of_address(name: str, address: str, host: Host, by_own_file: bool) -> tuple[HostDevice, ...]:
    folder = _pci(address, host)
    if not folder.exists():
        raise DeviceUnavailable(f"{name}: there is no such PCI device (lspci -D lists them)")
    group = _group_of(name, address, host)
    if not by_own_file:
        return _of_group(name, group, host)
    if (device := _member(name, address, group, host)) is None:
        raise DeviceUnavailable(f"{name} is a bridge, and these stay the host's")
    entries = sorted(os.listdir(folder / "vfio-dev")) if (folder / "vfio-dev").is_dir() else []
    if not entries:
        raise DeviceUnavailable(
            f"{name}: this kernel has no file for the device alone; it needs Linux 6.6 or later with VFIO_DEVICE_CDEV"
        )
    return (_by_own_file(device, entries[0], host),)


def _by_own_file(device: HostDevice, entry: str, host: Host) -> HostDevice:
    file = Path("/dev/vfio/devices", entry)
    _require_file(str(file), file, host)
    if not has_iommufd(host):
        raise DeviceUnavailable(
            f"{file} is opened through {IOMMU_FILE}, which is not there; load the kernel module iommufd, or name the "
            f"group's file, /dev/vfio/{device.group}"
        )
    return HostDevice(
        kind=device.kind,
        address=device.address,
        group=entry,
        own_file=file,
        vendor=device.vendor,
        device=device.device,
        device_class=device.device_class,
    )


def _members(name: str, group: str, host: Host) -> list[str]:
    try:
        return sorted(os.listdir(host.root / "sys/kernel/iommu_groups" / group / "devices"))
    except OSError as err:
        raise DeviceUnavailable(
            f"{name}: this host has no IOMMU group {group}; look at /sys/kernel/iommu_groups"
        ) from err


def _member(name: str, address: str, group: str, host: Host) -> HostDevice | None:
    """One device of a group; None for a bridge. Raises DeviceUnavailable when it is not ready."""
    if _UUID.fullmatch(address):
        return _mediated(name, address, host)
    folder = _pci(address, host)
    device_class = _number(folder / "class")
    if device_class >> 16 == _BRIDGES:
        return None
    driver = _driver(folder)
    if driver is None or not _VFIO_DRIVER.fullmatch(driver):
        raise DeviceUnavailable(
            f"{name}: device {address} of IOMMU group {group} is bound to {driver or 'no driver'}, and to be given to "
            f"a guest the whole group has to be bound to vfio-pci: {_bind(address)}"
        )
    return HostDevice(
        kind="pci",
        address=address,
        group=group,
        vendor=_number(folder / "vendor"),
        device=_number(folder / "device"),
        device_class=device_class,
    )


def _mediated(name: str, uuid: str, host: Host) -> HostDevice:
    folder = host.root / "sys/bus/mdev/devices" / uuid
    if not folder.exists():
        raise DeviceUnavailable(f"{name}: there is no mediated device {uuid} (mdevctl list)")
    interface = _text(folder / "mdev_type/device_api")
    kind = _MEDIATED.get(interface)
    if kind is None:
        raise DeviceUnavailable(
            f"{name}: mediated device {uuid} is of type {interface or 'unknown'}; guests are given those of types "
            + " and ".join(_MEDIATED)
        )
    if _driver(folder) is None:
        raise DeviceUnavailable(
            f"{name}: mediated device {uuid} has no driver; load the kernel module vfio_mdev"
        )
    group = _group_link(folder)
    if group is None:
        raise DeviceUnavailable(
            f"{name}: mediated device {uuid} is in no IOMMU group; start it: mdevctl start -u {uuid}"
        )
    queues = tuple(_text(folder / "matrix").split()) if kind == "ap" else ()
    if kind == "ap" and not queues:
        raise DeviceUnavailable(
            f"{name}: {uuid} has no queues; write an adapter to assign_adapter and a domain to assign_domain in "
            f"/sys/bus/mdev/devices/{uuid}"
        )
    parent = folder.resolve().parent.name
    return HostDevice(
        kind=kind,
        address=uuid,
        group=group,
        parent=parent if is_pci_address(parent) else "",
        queues=queues,
    )


def _group_of(name: str, address: str, host: Host) -> str:
    group = _group_link(_pci(address, host))
    if group is None:
        raise DeviceUnavailable(
            f"{name}: device {address} is in no IOMMU group; enable the IOMMU in the firmware and the kernel "
            "(intel_iommu=on)"
        )
    return group


def _group_link(folder: Path) -> str | None:
    try:
        return Path(os.readlink(folder / "iommu_group")).name
    except OSError:
        return None


def _require_file(name: str, file: Path, host: Host) -> None:
    if not (host.root / file.relative_to("/")).exists():
        raise DeviceUnavailable(
            f"{name}: {file} is not there; load the kernel module vfio-pci and bind the device again"
        )


def _bind(address: str) -> str:
    return (
        f"driverctl set-override {address} vfio-pci, or without it: modprobe vfio-pci; echo vfio-pci > "
        f"/sys/bus/pci/devices/{address}/driver_override; echo {address} > "
        f"/sys/bus/pci/devices/{address}/driver/unbind; echo {address} > /sys/bus/pci/drivers_probe"
    )


def _pci(address: str, host: Host) -> Path:
    return host.root / "sys/bus/pci/devices" / address


def _driver(folder: Path) -> str | None:
    try:
        return Path(os.readlink(folder / "driver")).name
    except OSError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int:
    """A number in sysfs's spelling, 0 where there is none."""
    try:
        return int(_text(path), 16)
    except ValueError:
        return 0
