"""Network interfaces of the caller's that become the container's: `linux.netDevices`."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

from netlink.rtnl import Rtnetlink
from oci_engine import linux
from oci_engine.errors import SpecError
from oci_engine.steps import step

if TYPE_CHECKING:
    from collections.abc import Iterator

    from netlink.objects import Address, Link


class _Device(NamedTuple):
    """`name` is what it is called in the container."""

    link: Link
    name: str
    addresses: list[Address]


@contextmanager
def moved(wanted: tuple[tuple[str, str], ...], pid: int) -> Iterator[None]:
    """To the network of a process, where they get their addresses again and are up. A block that fails gives them back.

    Raises SpecError for one that is not there or whose name is taken there, SetupFailed.
    """
    with ExitStack() as sockets:
        with step("linux.netDevices"):
            here = sockets.enter_context(Rtnetlink())
            there = sockets.enter_context(_in_network_of(pid))
        with ExitStack() as undo:
            _move_all(wanted, here, there, pid, undo)
            yield
            undo.pop_all()


def _move_all(
    wanted: tuple[tuple[str, str], ...], here: Rtnetlink, there: Rtnetlink, pid: int, undo: ExitStack
) -> None:
    with step("linux.netDevices"):
        links = {link.name: link for link in here.links()}
        addresses = here.lasting_addresses()
        taken = {link.name for link in there.links()}
    for hosts_name, name in wanted:
        place = f"linux.netDevices[{hosts_name!r}]"
        if hosts_name not in links:
            raise SpecError(place, "there is no such interface")
        if name in taken:
            raise SpecError(place, f"the container's network has an interface {name} already")
        link = links[hosts_name]
        device = _Device(link, name, [each for each in addresses if each.ifindex == link.ifindex])
        with step(place):
            _move(device, here, pid)
            undo.callback(_bring_back, device, here, there)
            _revive(device, name, there)


def _in_network_of(pid: int) -> Rtnetlink:
    """A socket there. Only this thread goes, and comes back."""
    target = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        linux.setns(target, linux.CLONE_NEWNET)
        try:
            return Rtnetlink()
        finally:
            linux.setns(own, linux.CLONE_NEWNET)
    finally:
        os.close(target)
        os.close(own)


def _move(device: _Device, here: Rtnetlink, pid: int) -> None:
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        here.move_link(device.link.ifindex, device.name, namespace)
    finally:
        os.close(namespace)


def _revive(device: _Device, name: str, rtnl: Rtnetlink) -> None:
    """What the kernel takes from an interface that moves."""
    ifindex = next(link.ifindex for link in rtnl.links() if link.name == name)
    for address in device.addresses:
        rtnl.add_address(address._replace(ifindex=ifindex))
    rtnl.set_link(ifindex, up=True)


def _bring_back(device: _Device, here: Rtnetlink, there: Rtnetlink) -> None:
    """Of a container that could not be made: with its network an interface like a veth would be gone."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        ifindex = next(link.ifindex for link in there.links() if link.name == device.name)
        there.move_link(ifindex, device.link.name, own)
    finally:
        os.close(own)
    _revive(device, device.link.name, here)
