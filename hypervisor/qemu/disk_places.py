"""Where virtio disks find a place that are plugged into a running machine: behind one bridge, or at a port each.

On channels (s390x) devices find a place by themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypervisor.qemu.bridge import SLOTS, PciBridge, Place
from hypervisor.qemu.rare_args import PciePort

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.arch import Arch
    from hypervisor.qemu import args

_BRIDGE = "disk-bridge"
# As many as Kata's bridges reserve: for the disks' registers, which are 4 KiB and 16 KiB for each.
_RESERVED_IO, _RESERVED_MEMORY = "4k", "1m"
_PORT = "disk-port"
PORTS = 8
# Far from the numbers of ports for interfaces, which start at 64.
_FIRST_CHASSIS = 128


def disk_places(arch: Arch) -> Iterator[args.Switch]:
    """What makes room for disks on the command line."""
    if arch.plug_in_bridge:
        yield PciBridge(
            driver="pci-bridge",
            id=_BRIDGE,
            bus="pcie.0",
            chassis_nr=1,
            shpc=False,
            io_reserve=_RESERVED_IO,
            mem_reserve=_RESERVED_MEMORY,
            pref64_reserve=_RESERVED_MEMORY,
        )
    elif arch.pcie_ports:
        for index, place in enumerate(places(arch)):
            number = _FIRST_CHASSIS + index
            yield PciePort(driver="pcie-root-port", id=place.bus, bus="pcie.0", chassis=number, slot=number)


def places(arch: Arch) -> list[Place]:
    """All places for disks that the command line has made; none where they need none."""
    if arch.plug_in_bridge:
        return [Place(_BRIDGE, slot) for slot in SLOTS]
    return [Place(f"{_PORT}{index}") for index in range(PORTS if arch.pcie_ports else 0)]
