"""Spare ports, which devices of the host take: of the root complex, of one switch below it, or behind one bridge.

The first are those of the devices that a machine starts with. Who plugs one in later takes a port that has nothing
behind it, by QEMU's own word.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec
from hypervisor.qemu.bridge import SLOTS, PciBridge, Place
from hypervisor.qemu.rare_args import PciePort

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hypervisor.arch import Arch
    from hypervisor.qemu import args
    from hypervisor.qemu.commands import PciBus, PciDevice
    from hypervisor.spec import VmSpec
    from hypervisor.vfio import PortKind

# As many as Kata's configuration allows.
_MOST_PORTS = 16
_BRIDGE = "vfio-bridge"
# Number 1 is that of a bridge for disks.
_BRIDGE_CHASSIS = 2
_KEYS = {"root-port": "pcie_root_port", "switch-port": "pcie_switch_port", "bridge-port": ""}


def spare_ports(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    """All ports of the machine. Raises InvalidSpec for those that it cannot have."""
    wanted = _behind_ports(spec) + spec.host_device_places
    counts = {
        "root-port": spec.pcie_root_ports,
        "switch-port": spec.pcie_switch_ports,
        "bridge-port": 0,
    }
    counts[spec.host_device_port] = max(counts[spec.host_device_port], wanted)
    roots, switched, bridged = counts.values()
    if not any(counts.values()):
        return
    _check(spec, arch, counts)
    # Chassis 0 is QEMU's default: starting at 1 keeps clear of ports that others make.
    for index in range(max(roots, 1 if switched else 0)):
        yield PciePort(driver="pcie-root-port", id=f"rp{index}", bus="pcie.0", chassis=index + 1, slot=index)
    if switched:
        yield PciePort(driver="x3130-upstream", id="swup0", bus="rp0")
    for index in range(switched):
        yield PciePort(
            driver="xio3130-downstream", id=f"swdp{index}", bus="swup0", chassis=index + 2, slot=index
        )
    if bridged:
        yield PciBridge(driver="pci-bridge", id=_BRIDGE, bus="pcie.0", chassis_nr=_BRIDGE_CHASSIS, shpc=False)


def first_places(spec: VmSpec) -> list[Place]:
    """Where the PCI devices of the host are that the machine starts with, in their order."""
    return list(islice(_places(spec.host_device_port, SLOTS.stop), _behind_ports(spec)))


def free_place(spec: VmSpec, buses: Sequence[PciBus]) -> Place | None:
    """A place for one more device of the host, by what QEMU says is on its buses; None when all are taken."""
    ports = {device.qdev_id: device for bus in buses for device in _all_below(bus.devices)}
    for place in _places(spec.host_device_port, SLOTS.stop):
        port = ports.get(place.bus)
        if port is None:
            return None
        behind = port.pci_bridge.devices if port.pci_bridge is not None else ()
        if all(device.slot != place.slot for device in behind):
            return place
    return None


def port_key(kind: PortKind) -> str:
    """The configuration's key for the number of such ports; empty when they have none."""
    return _KEYS[kind]


def _behind_ports(spec: VmSpec) -> int:
    return sum(device.kind != "ap" for device in spec.host_devices)


def _places(kind: PortKind, limit: int) -> Iterator[Place]:
    if kind == "bridge-port":
        yield from (Place(_BRIDGE, slot) for slot in SLOTS)
    else:
        name = "rp" if kind == "root-port" else "swdp"
        yield from (Place(f"{name}{index}") for index in range(limit))


def _all_below(devices: Sequence[PciDevice]) -> Iterator[PciDevice]:
    for device in devices:
        yield device
        if device.pci_bridge is not None:
            yield from _all_below(device.pci_bridge.devices)


def _check(spec: VmSpec, arch: Arch, counts: dict[str, int]) -> None:
    roots, switched, bridged = counts.values()
    if not arch.pcie_ports:
        raise InvalidSpec(
            f"{arch.name} guests have no PCIe ports, and no PCI devices of the host; set pcie_root_port and "
            "pcie_switch_port to 0"
        )
    if roots and switched:
        raise InvalidSpec(
            "spare ports are of the root complex or of a switch; set one of pcie_root_port, pcie_switch_port"
        )
    if max(roots, switched) > _MOST_PORTS:
        raise InvalidSpec(f"{max(roots, switched)} PCIe ports are more than {_MOST_PORTS}")
    if bridged > len(SLOTS):
        raise InvalidSpec(f"{bridged} devices are more than the {len(SLOTS)} that a bridge takes")
    if bridged and spec.host_device_places and arch.name != "x86_64":
        raise InvalidSpec(
            f"nothing is plugged in behind a bridge of {arch.name} guests; set hot_plug_vfio to root-port"
        )
