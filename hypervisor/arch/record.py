"""The record that holds everything QEMU's command line needs to know about one architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hypervisor.spec import Accel


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """A `-cpu` model and the features that go with it as long as it is the default."""

    model: str
    features: str = ""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """QEMU's device types. They differ by bus, and not every type exists on every bus."""

    user_vsock: str
    vhost_vsock: str
    fs: str
    block: str
    console: str | None
    """The serial port's device type; None when the board brings one that takes `-serial`."""


@dataclass(frozen=True, kw_only=True)
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
    kernel_words: tuple[str, ...]
    """Kernel command line, for every accelerator; includes the console."""
    tcg_kernel_words: tuple[str, ...] = ()
    tsc: bool = False
    """Whether guests count time with a TSC whose rate the host can tell."""
