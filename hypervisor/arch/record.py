"""The record that holds everything QEMU's command line needs to know about one architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hypervisor.spec import Accel


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Cpu:
    """A `-cpu` model and the features that go with it as long as it is the default."""

    model: str
    features: str = ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Devices:
    """QEMU's device types. They differ by bus, and not every type exists on every bus."""

    user_vsock: str
    vhost_vsock: str
    fs: str
    plan9: str
    """9p, served by QEMU."""
    block: str
    net: str
    console: str | None
    """The serial port's device type; None when the board brings one that takes `-serial`."""
    bus: Literal["pci", "ccw"] = "pci"
    """How the names of virtio devices end that exist for both."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Iommu:
    """What makes a virtual IOMMU."""

    kernel_words: tuple[str, ...]
    device: str | None = None
    """None when the machine's own is used."""
    device_props: str = ""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Arch:
    """One architecture of guests."""

    name: str
    """As `uname -m` says it."""
    qemu_binary: str
    machine: str
    machine_props: Mapping[Accel, str]
    """Properties of `-machine` that belong to the default machine type, comma separated."""
    cpu: Mapping[Accel, Cpu]
    devices: Devices
    byte_order: Literal["little", "big"] = "little"
    kernel_words: tuple[str, ...]
    """Kernel command line, for every accelerator; includes the console."""
    tcg_kernel_words: tuple[str, ...] = ()
    tcg_one_cpu_words: tuple[str, ...] = ()
    """The same, of guests that never have more than one processor."""
    kvm_only_machine_props: frozenset[str] = frozenset()
    """Properties that configuration files for this architecture carry and QEMU refuses without KVM."""
    iommu: Iommu | None = None
    """How guests get a virtual IOMMU; None where there is none."""
    nvdimm: bool = False
    """Whether a disk image can be the guest's memory, `/dev/pmem0`."""
    nvdimm_by_firmware: bool = False
    """Whether guests find it only when firmware describes the machine to them."""
    dax: bool = False
    """Whether guests map files of such an image without copying them."""
    panic: str | None = None
    """The device by which a guest tells of its kernel's panic; None where QEMU sees it without one."""
    pcie_ports: bool = False
    numa: bool = False
    """Whether a guest can be told which memory and processors are near each other."""
    plug_in_bridge: bool = False
    """Whether devices can be plugged in behind a PCI bridge, one device with places for thirty: firmware has to see to
    that. Elsewhere each needs a port of its own."""
    plugs_vcpus: bool = False
    """Whether processors can be added while the machine runs."""
    unplugs_vcpus: bool = False
    """Whether they can be taken out again."""
    dimms: bool = False
    """Whether memory modules can be added while the machine runs."""
    growth_words: tuple[str, ...] = ()
    """Kernel command line of guests that memory can be added to."""
    no_nested_virtualization: str = ""
    """`-cpu` features that hide virtualization, where a model may have it."""
    tsc: bool = False
    """Whether guests count time with a TSC whose rate the host can tell."""
