"""A PCI bridge that devices are plugged in behind, and the places for them: on it, or at ports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hypervisor.qemu.args import Device

# PCI has 32 slots on a bus. Firmware that plugs devices in does not use the first and the last; Kata leaves them out,
# too, and its agent reads paths the same way.
SLOTS = range(1, 31)


class Place(NamedTuple):
    """A bus and a slot on it."""

    bus: str
    slot: int = 0


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PciBridge(Device):
    """A bridge to PCI. Without `shpc`, its own way, it is firmware (ACPI) that plugs devices in behind it. The sizes
    are what it reserves for their registers; without them it is what QEMU decides."""

    id: str
    bus: str
    chassis_nr: int
    shpc: bool
    io_reserve: str | None = None
    mem_reserve: str | None = None
    pref64_reserve: str | None = None
