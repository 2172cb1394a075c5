"""Devices that few machines have, after all others, so that the places of those do not depend on them: disks with
extensions, memory to be added, a balloon, a source of random numbers, and what disks that are added later need.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hypervisor.errors import InvalidSpec
from hypervisor.qemu import args
from hypervisor.qemu.cmdline import virtio_disk
from hypervisor.qemu.rare_args import IoThread
from hypervisor.qemu.room import room_mib

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from hypervisor.arch import Arch
    from hypervisor.spec import VmSpec


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtioScsi(args.Device):
    """A SCSI controller."""

    id: str
    iothread: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtioMem(args.Device):
    """Memory of which the guest gets as much as is requested: none at first."""

    id: str
    memdev: str
    requested_size: int = 0


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtioBalloon(args.Device):
    """A balloon; with page reporting the guest tells which of its pages are free, and the host takes them back."""

    id: str
    free_page_reporting: bool = True


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RngRandom(args.Props):
    """`-object rng-random`: random numbers from a file of the host."""

    id: str
    filename: Path

    def argv(self) -> list[str]:
        return ["-object", args.join_props("rng-random", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtioRng(args.Device):
    """A source of random numbers for the guest."""

    rng: str


def extras(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    """What the specification asks for of these."""
    bus = arch.devices.bus
    for index, extension in enumerate(spec.extensions):
        serial = f"extension-{extension.name}"
        yield from virtio_disk(spec, arch, f"extension{index}", extension.image, serial=serial)
    if spec.scsi:
        if spec.iothread:
            yield IoThread(id="scsi-io")
        yield VirtioScsi(
            driver=f"virtio-scsi-{bus}", id="scsi0", iothread="scsi-io" if spec.iothread else None
        )
    for index in range(spec.spare_iothreads):
        yield IoThread(id=f"spare-io{index}")
    yield from _memory_to_add(spec, arch)
    if spec.balloon:
        yield VirtioBalloon(driver=f"virtio-balloon-{bus}", id="balloon0")
    if spec.entropy_source is not None:
        yield RngRandom(id="rng0", filename=spec.entropy_source)
        yield VirtioRng(driver=f"virtio-rng-{bus}", rng="rng0")


def _memory_to_add(spec: VmSpec, arch: Arch) -> Iterator[args.Switch]:
    room = room_mib(spec, arch)
    if not spec.virtio_mem or room <= 0:
        return
    yield args.MemoryBackendMemfd(
        id="virtio-mem",
        size=f"{room}M",
        reserve=False,  # it is a limit: the host need not have that much
        hugetlb=spec.hugepages or None,
    )
    yield VirtioMem(driver=f"virtio-mem-{arch.devices.bus}", id="virtio-mem0", memdev="virtio-mem")


def behind_iommu_platform(switches: list[args.Switch], arch: Arch) -> list[args.Switch]:
    """All virtio devices on channels, told to use the platform's way to the guest's memory. Raises InvalidSpec."""
    if arch.devices.bus != "ccw":
        raise InvalidSpec(
            f"{arch.name} guests have no devices on channels; remove enable_iommu_platform, or set enable_iommu"
        )
    return [
        replace(switch, iommu_platform=True)
        if isinstance(switch, args.Device) and switch.driver.endswith("-ccw")
        else switch
        for switch in switches
    ]
