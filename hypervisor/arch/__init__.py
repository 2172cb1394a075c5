"""Architectures as data: one record each. Adding one is adding a record, not a branch in the builder."""

from __future__ import annotations

from types import MappingProxyType

from hypervisor.arch.record import Arch, Cpu, Devices
from hypervisor.arch.x86_64 import X86_64
from hypervisor.errors import InvalidSpec

__all__ = ["ARCHES", "Arch", "Cpu", "Devices", "arch_named"]

ARCHES = MappingProxyType({arch.name: arch for arch in (X86_64,)})


def arch_named(name: str) -> Arch:
    """The record of an architecture. Raises InvalidSpec for one we have no record of."""
    try:
        return ARCHES[name]
    except KeyError:
        raise InvalidSpec(f"no support for {name} guests; supported: {', '.join(sorted(ARCHES))}") from None
