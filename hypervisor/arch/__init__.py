"""Architectures as data: one record each. Adding one is adding a record, not a branch in the builder."""

from __future__ import annotations

from types import MappingProxyType

from hypervisor.arch.record import Arch, Cpu, Devices, Iommu
from hypervisor.arch.x86_64 import X86_64
from hypervisor.errors import InvalidSpec

__all__ = ["MACHINES", "Arch", "Cpu", "Devices", "Iommu", "arch_named", "arch_of_machine"]

# Types of machines, and the architecture of the guests in them.
MACHINES = MappingProxyType({"q35": "x86_64", "virt": "aarch64", "s390-ccw-virtio": "s390x"})


def arch_named(name: str) -> Arch:
    """The record of an architecture. Raises InvalidSpec for one we have no record of."""
    if name == "x86_64":
        return X86_64
    if name == "aarch64":
        from hypervisor.arch.aarch64 import AARCH64

        return AARCH64
    if name == "s390x":
        from hypervisor.arch.s390x import S390X

        return S390X
    raise InvalidSpec(f"no support for {name} guests; supported: {', '.join(sorted(MACHINES.values()))}")


def arch_of_machine(machine: str) -> str:
    """The architecture whose guests run in this type of machine. Raises InvalidSpec for a type of none."""
    try:
        return MACHINES[machine]
    except KeyError:
        known = ", ".join(MACHINES)
        raise InvalidSpec(f"no support for machines of type {machine!r}; supported: {known}") from None
