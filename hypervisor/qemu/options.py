"""What most guests do without: an IOMMU, spare ports, a second monitor, a panic device, directories by 9p."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec
from hypervisor.qemu.args import Mon
from hypervisor.qemu.rare_args import (
    ChardevListener,
    FsdevLocal,
    IommuDevice,
    NoShutdown,
    PciePort,
    PvPanic,
    Virtio9p,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hypervisor.arch import Arch
    from hypervisor.qemu import args
    from hypervisor.spec import ExtraMonitor, VmSpec

_MOST_PORTS = 16


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


def spare_ports(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    """Ports for devices added later, of the root complex or of one switch below it."""
    roots, switched = spec.pcie_root_ports, spec.pcie_switch_ports
    if not arch.pcie_ports:
        raise InvalidSpec(
            f"{arch.name} guests have no PCIe ports; set pcie_root_port and pcie_switch_port to 0"
        )
    if roots and switched:
        raise InvalidSpec(
            "spare ports are of the root complex or of a switch; set one of pcie_root_port, pcie_switch_port"
        )
    if max(roots, switched) > _MOST_PORTS:
        raise InvalidSpec(f"{max(roots, switched)} PCIe ports are more than {_MOST_PORTS}")
    # Chassis 0 is QEMU's default: starting at 1 keeps clear of ports that others make.
    for index in range(max(roots, 1)):
        yield PciePort(driver="pcie-root-port", id=f"rp{index}", bus="pcie.0", chassis=index + 1, slot=index)
    if switched:
        yield PciePort(driver="x3130-upstream", id="swup0", bus="rp0")
    for index in range(switched):
        yield PciePort(
            driver="xio3130-downstream", id=f"swdp{index}", bus="swup0", chassis=index + 2, slot=index
        )


def panic_device(arch: Arch) -> Iterator[args.Switch]:
    """How the guest's kernel says that it gives up; QEMU then stops, with the guest's memory as it was."""
    if arch.panic is not None:
        yield PvPanic(driver=arch.panic)
    yield NoShutdown()
