"""What most guests do without: an IOMMU, a second monitor, a panic device, directories by 9p."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec
from hypervisor.qemu.args import Mon
from hypervisor.qemu.rare_args import (
    ChardevListener,
    FsdevLocal,
    IommuDevice,
    NoShutdown,
    PvPanic,
    Virtio9p,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hypervisor.arch import Arch
    from hypervisor.qemu import args
    from hypervisor.spec import ExtraMonitor, VmSpec


def extra_monitor(kind: ExtraMonitor, run_dir: Path) -> Iterator[args.Switch]:
    """A monitor for people, on a socket in the machine's directory."""
    yield ChardevListener(id="extra-monitor", path=run_dir / "extra-monitor.sock")
    yield Mon(
        chardev="extra-monitor",
        mode="readline" if kind == "hmp" else "control",
        pretty=True if kind == "qmp-pretty" else None,
    )


def exports(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    """Directories that QEMU serves by 9p."""
    for index, export in enumerate(spec.exports):
        name = f"export{index}"
        yield FsdevLocal(id=name, path=export.directory)
        yield Virtio9p(driver=arch.devices.plan9, fsdev=name, mount_tag=export.tag)


def iommu(arch: Arch) -> Iterator[args.Switch]:
    """The IOMMU's device, before all devices behind it."""
    if arch.iommu is None:
        raise InvalidSpec(f"{arch.name} guests have no virtual IOMMU; remove enable_iommu")
    if arch.iommu.device is not None:
        yield IommuDevice(driver=arch.iommu.device, raw=arch.iommu.device_props)


def panic_device(arch: Arch) -> Iterator[args.Switch]:
    """How the guest's kernel says that it gives up; QEMU then stops, with the guest's memory as it was."""
    if arch.panic is not None:
        yield PvPanic(driver=arch.panic)
    yield NoShutdown()
