"""A host with devices that a guest can be given, as its /sys and /dev show them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hypervisor.host import Host

if TYPE_CHECKING:
    from pathlib import Path


class FakeSysfs:
    """Written below a folder; `host` sees it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.host = Host(root=root)
        for name in (
            "sys/kernel/iommu_groups",
            "sys/bus/pci/devices",
            "sys/bus/mdev/devices",
            "dev/vfio/devices",
        ):
            (root / name).mkdir(parents=True, exist_ok=True)

    def pci(
        self,
        address: str,
        group: str = "",
        *,
        driver: str = "vfio-pci",
        device_class: int = 0x030200,
        ids: tuple[int, int] = (0x10DE, 0x2331),
    ) -> Path:
        """A PCI device, bound to `driver` if that is not empty, in an IOMMU group if there is one."""
        folder = self.root / "sys/devices/pci0000:3a" / address
        folder.mkdir(parents=True)
        (self.root / "sys/bus/pci/devices" / address).symlink_to(folder)
        for name, value in (("class", device_class), ("vendor", ids[0]), ("device", ids[1])):
            (folder / name).write_text(f"0x{value:0{6 if name == 'class' else 4}x}\n")
        self._in_group(folder, group, driver)
        return folder

    def own_file(self, address: str, entry: str) -> None:
        """The file of a PCI device by itself, as Linux 6.6 has it, and the one that all of them are opened through."""
        folder = self.root / "sys/bus/pci/devices" / address
        (folder / "vfio-dev" / entry).mkdir(parents=True)
        classes = self.root / "sys/class/vfio-dev" / entry
        classes.mkdir(parents=True)
        (classes / "device").symlink_to(folder.resolve())
        (self.root / "dev/vfio/devices" / entry).touch()
        (self.root / "dev/iommu").touch()

    def mediated(
        self,
        uuid: str,
        group: str,
        interface: str,
        *,
        queues: str = "",
        driver: str = "vfio_mdev",
        parent: str = "matrix",
    ) -> None:
        """A device that a driver has made out of another one."""
        folder = self.root / "sys/devices" / parent / uuid
        (folder / "mdev_type").mkdir(parents=True)
        (self.root / "sys/bus/mdev/devices" / uuid).symlink_to(folder)
        (folder / "mdev_type/device_api").write_text(f"{interface}\n")
        (folder / "matrix").write_text(queues)
        self._in_group(folder, group, driver)

    def _in_group(self, folder: Path, group: str, driver: str) -> None:
        if driver:
            os.symlink(f"../../bus/drivers/{driver}", folder / "driver")
        if group:
            members = self.root / "sys/kernel/iommu_groups" / group / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / folder.name).symlink_to(folder)
            (folder / "iommu_group").symlink_to(members.parent)
            (self.root / "dev/vfio" / group).touch()
