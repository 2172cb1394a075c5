"""The guest's network interfaces: a virtio device each, from the start or plugged in later. Behind it is a tap
or a macvtap of the host, or a vhost-user server.

Loaded when a machine has one, or a place for one.
"""

from __future__ import annotations

import socket
import stat
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from hypervisor.arch import arch_named
from hypervisor.errors import HostUnsupported, HotplugRefused, HypervisorError, InvalidSpec
from hypervisor.netns import entered
from hypervisor.qemu import commands
from hypervisor.qemu.args import Device, Props, join_props
from hypervisor.qemu.rare_args import PciePort
from hypervisor.tap import open_tap, open_vhost_net

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from hypervisor.arch import Arch
    from hypervisor.qemu import args
    from hypervisor.qemu.qmp import Monitor
    from hypervisor.spec import Nic, VmSpec

_PORT = "nic-port"
_FIRST_CHASSIS = 64


class NicFds(NamedTuple):
    """An interface's descriptors: one of the tap for each queue, and as many of vhost-net or none; none at all with a
    vhost-user server."""

    tap: tuple[int, ...] = ()
    vhost: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TapNetdev(Props):
    """`-netdev tap` on inherited descriptors."""

    id: str
    fds: str
    vhost: bool | None = None
    vhostfds: str | None = None

    def argv(self) -> list[str]:
        return ["-netdev", join_props("tap", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ChardevClient(Props):
    """`-chardev socket` that connects to a path."""

    id: str
    path: Path

    def argv(self) -> list[str]:
        return ["-chardev", join_props("socket", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VhostUserNetdev(Props):
    """`-netdev vhost-user`: a server at the other end of a socket carries the packets."""

    id: str
    chardev: str
    queues: int | None

    def argv(self) -> list[str]:
        return ["-netdev", join_props("vhost-user", self)]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtioNet(Device):
    """A virtio network interface. Without `romfile` it would bring firmware to boot from, which only takes time."""

    id: str
    netdev: str
    mac: str
    bus: str | None
    romfile: str | None
    mq: bool | None
    vectors: int | None
    rx_queue_size: int | None
    tx_queue_size: int | None

    def properties(self) -> dict[str, object]:
        """For the monitor's device_add, which takes driver and id apart."""
        words = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in words.items() if value is not None and name not in ("driver", "id")
        }


class Interfaces:
    """The interfaces of a running machine: which port each has, and which ports are free."""

    def __init__(self, spec: VmSpec) -> None:
        self._arch = arch_named(spec.arch)
        self._netns = spec.netns
        self._bounces = spec.iommu_platform
        ports = _ports(spec, self._arch)
        self._taken: dict[str, str | None] = {nic.id: next(ports) for nic in spec.nics}
        self._free = list(islice(ports, spec.nic_ports))

    async def plug(self, monitor: Monitor, nic: Nic) -> None:
        """Give the guest one more interface. Raises HotplugRefused, HostUnsupported, QmpError."""
        if not self._free:
            raise HotplugRefused(
                f"cannot plug in interface {nic.mac}: all {len(self._taken)} ports for interfaces are taken"
            )
        with ExitStack() as ours:
            with entered(self._netns):
                fds = opened(nic, ours)
            device = replace(
                _device(nic, self._arch, self._free[0]), iommu_platform=True if self._bounces else None
            )
            await self._add(monitor, nic, fds, device)
        self._taken[nic.id] = self._free.pop(0)

    async def unplug(self, monitor: Monitor, nic_id: str) -> None:
        """Take an interface and its tap away; nothing happens when it is not there. Raises HotplugRefused, QmpError."""
        if nic_id not in self._taken:
            return
        await commands.unplug(monitor, nic_id)
        await commands.netdev_del(monitor, _netdev_id(nic_id))
        self._free.append(self._taken.pop(nic_id))

    async def _add(self, monitor: Monitor, nic: Nic, fds: NicFds, device: VirtioNet) -> None:
        names = [f"{nic.id}-{index}" for index in range(len(fds.tap) + len(fds.vhost))]
        given: list[str] = []
        try:
            for name, fd in zip(names, (*fds.tap, *fds.vhost), strict=True):
                await commands.getfd(monitor, name, fd)
                given.append(name)
            queues = len(fds.tap)
            await commands.netdev_add_tap(monitor, device.netdev, names[:queues], names[queues:])
        except HypervisorError:
            for name in given:
                await commands.closefd(monitor, name)
            raise
        try:
            await commands.device_add(monitor, device.driver, device.id, device.properties())
        except HypervisorError:
            await commands.netdev_del(monitor, device.netdev)
            raise


def opened(nic: Nic, undo: ExitStack) -> NicFds:
    """Make the interface's tap in the current network namespace, or open the one that is there; `undo` closes our
    descriptors.

    Raises HostUnsupported.
    """
    if nic.vhost_user is not None:
        _demand_socket(nic.vhost_user)
        return NicFds()
    if nic.existing:
        _demand_tap(nic.tap)
    if nic.parent:
        from hypervisor.macvtap import open_macvtap

        tap = open_macvtap(nic.tap, nic.parent, nic.queues, undo)
    else:
        tap = open_tap(nic.tap, nic.queues, undo)
    return NicFds(tap, open_vhost_net(nic.queues, undo) if nic.vhost else ())


def _demand_tap(name: str) -> None:
    """Opening a tap that is not there would make one."""
    if name not in (known for _, known in socket.if_nameindex()):
        raise HostUnsupported(
            f"there is no tap {name} in the machine's network namespace; who gives it makes it"
        )


def _demand_socket(path: Path) -> None:
    """QEMU itself would name the path only; it connects by itself, since it does not take descriptors for this."""
    try:
        there = stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        there = False
    if not there:
        raise HostUnsupported(
            f"there is no socket {path}; the server of a vhost-user interface has to listen there"
        )


def switches(spec: VmSpec, fds: Sequence[NicFds], arch: Arch) -> Iterator[args.Switch]:
    """The interfaces and the free ports for more: each has a port of its own, so each can be taken out again."""
    ports = _ports(spec, arch)
    for nic, nic_fds in zip(spec.nics, fds, strict=True):
        port = next(ports)
        yield from _port(port)
        yield from _netdev(nic, nic_fds, spec)
        device = _device(nic, arch, port)
        if nic.vhost_user is not None and spec.accel == "tcg" and port is not None:
            # QEMU before 9.1 follows a pointer that only KVM sets when such a device signals by a message
            # (CVE-2024-4693).
            device = replace(device, vectors=0)
        yield device
    for port in islice(ports, spec.nic_ports):
        yield from _port(port)


def _netdev(nic: Nic, fds: NicFds, spec: VmSpec) -> Iterator[args.Switch]:
    if nic.vhost_user is None:
        yield TapNetdev(
            id=_netdev_id(nic.id),
            fds=_joined(fds.tap),
            vhost=True if fds.vhost else None,
            vhostfds=_joined(fds.vhost) if fds.vhost else None,
        )
        return
    if spec.protection is not None:
        raise InvalidSpec(
            f"interface {nic.mac}: a vhost-user server cannot see the memory of a confidential guest"
        )
    chardev = f"{nic.id}-server"
    yield ChardevClient(id=chardev, path=nic.vhost_user)
    queues = nic.queues if nic.queues > 1 else None
    yield VhostUserNetdev(id=_netdev_id(nic.id), chardev=chardev, queues=queues)


def _ports(spec: VmSpec, arch: Arch) -> Iterator[str | None]:
    """The names of the ports, in order; None where devices find a place by themselves."""
    for index in range(len(spec.nics) + spec.nic_ports):
        yield f"{_PORT}{index}" if arch.pcie_ports else None


def _port(name: str | None) -> Iterator[args.Switch]:
    if name is not None:
        # Numbers far from those of other ports, which start at 1.
        number = _FIRST_CHASSIS + int(name.removeprefix(_PORT))
        yield PciePort(driver="pcie-root-port", id=name, bus="pcie.0", chassis=number, slot=number)


def _device(nic: Nic, arch: Arch, bus: str | None) -> VirtioNet:
    several, pci = nic.queues > 1, bus is not None
    return VirtioNet(
        driver=arch.devices.net,
        id=nic.id,
        netdev=_netdev_id(nic.id),
        mac=nic.mac,
        bus=bus,
        romfile="" if pci else None,
        mq=True if several else None,
        # Two for each queue pair, one for changes of the settings, one for the control queue.
        vectors=2 * nic.queues + 2 if several and pci else None,
        rx_queue_size=nic.queue_size or None,
        # QEMU itself carries no more than 256 at once.
        tx_queue_size=nic.queue_size if nic.queue_size and nic.vhost_user else None,
    )


def _netdev_id(nic_id: str) -> str:
    return f"{nic_id}-tap"


def _joined(fds: tuple[int, ...]) -> str:
    return ":".join(map(str, fds))
