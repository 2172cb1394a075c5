"""What a pod's network namespace has, and how the guest is told of it. Nothing here changes anything.

Whatever kind an interface is of, the guest gets a virtio one with its MAC address, name, MTU and addresses: how the
packets come to the interface is the host's business.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, NamedTuple

from netlink import rules
from netlink.objects import IFF_LOOPBACK, IFF_NOARP, IFF_UP, LINK_LOCAL, NUD_PERMANENT
from netlink.routes import (
    NOWHERE,
    RT_TABLE_LOCAL,
    RT_TABLE_MAIN,
    RTN_LOCAL,
    RTN_UNICAST,
    RTPROT_KERNEL,
    RTPROT_RA,
    RTPROT_REDIRECT,
)
from shim.errors import NetworkNotMirrored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from agent_proto.gen import types_pb2
    from netlink.objects import Address, Link, Neighbour
    from netlink.routes import Route
    from netlink.rtnl import Rtnetlink
    from netlink.rules import Rule

#: What the names of our taps end with, as Kata's do.
TAP_SUFFIX = "_kata"
_ETHERNET_BYTES = 6
#: What an interface has for a MAC address whose other end does not look at it: a netkit in its L3 mode.
NO_MAC = "00:00:00:00:00:00"


def tap_of(ifindex: int) -> str:
    """The name of the tap beside the interface with this index. 15 bytes hold every index that a namespace reaches."""
    return f"tap{ifindex}{TAP_SUFFIX}"


def mac_in_place(ifindex: int) -> str:
    """What the guest's interface has where the pod's has NO_MAC: nobody but the two ever sees it."""
    return ":".join(f"{byte:02x}" for byte in (0x02, 0, *ifindex.to_bytes(4, "big")))


class Interface(NamedTuple):
    """One interface of the pod with its addresses."""

    link: Link
    addresses: tuple[Address, ...]

    @property
    def key(self) -> tuple[int, str]:
        """What makes it the same interface: with another MAC address it is another one for the guest."""
        return self.link.ifindex, self.link.mac

    @property
    def tap(self) -> str:
        """The name of its tap."""
        return tap_of(self.link.ifindex)


class Snapshot(NamedTuple):
    """All that the guest shall have, at one moment. `loopback` is the index of the interface to oneself."""

    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    rules: tuple[Rule, ...] = rules.DEFAULT
    loopback: int = 0

    def without(self, interface: Interface) -> Snapshot:
        """The rest, when an interface is not there."""
        gone = {interface.link.ifindex}
        return self._replace(
            interfaces=tuple(other for other in self.interfaces if other.key != interface.key),
            routes=tuple(_leading(self.routes, lambda ifindex: ifindex not in gone)),
            neighbours=tuple(neighbour for neighbour in self.neighbours if neighbour.ifindex not in gone),
        )


def scan(rtnl: Rtnetlink) -> Snapshot:
    """What the namespace of the socket has now.

    Interfaces that are down are not the pod's: the kernel itself puts some into every namespace.

    Raises:
        NetworkNotMirrored: an interface that no Ethernet device can stand for.
        OSError: the kernel does not answer.
    """
    addresses, links = rtnl.addresses(), rtnl.links()
    interfaces = tuple(
        Interface(link, tuple(address for address in addresses if address.ifindex == link.ifindex))
        for link in map(_usable, links)
        if link.flags & IFF_UP and not link.flags & IFF_LOOPBACK and not link.name.endswith(TAP_SUFFIX)
    )
    for interface in interfaces:
        _refuse_without_mac(interface.link)
    there = {interface.link.ifindex for interface in interfaces}
    loopback = next((link.ifindex for link in links if link.flags & IFF_LOOPBACK), 0)
    routes = (route for route in rtnl.routes() if _is_the_pods(route))
    neighbours = (
        neighbour
        for neighbour in rtnl.neighbours()
        if neighbour.state & NUD_PERMANENT and neighbour.ifindex in there and neighbour.mac
    )
    return Snapshot(
        interfaces,
        tuple(_leading(routes, {*there, loopback}.__contains__)),
        tuple(neighbours),
        _rules(rtnl),
        loopback,
    )


def _usable(link: Link) -> Link:
    """No guest's interface comes up with NO_MAC."""
    if link.mac == NO_MAC and link.flags & IFF_NOARP:
        return link._replace(mac=mac_in_place(link.ifindex))
    return link


def _is_the_pods(route: Route) -> bool:
    """Not what every kernel makes by itself, of a machine's own addresses, and of what routers tell it."""
    if route.protocol == RTPROT_KERNEL:
        return (
            route.kind == RTN_UNICAST
            and route.table != RT_TABLE_LOCAL
            and (route.table != RT_TABLE_MAIN or not route.destination.startswith(LINK_LOCAL))
        )
    return route.kind in (RTN_UNICAST, RTN_LOCAL, *NOWHERE) and route.protocol not in (
        RTPROT_RA,
        RTPROT_REDIRECT,
    )


def _leading(routes: Iterable[Route], there: Callable[[int], bool]) -> Iterator[Route]:
    """Routes with those of their ways whose interface is there; those that lead nowhere too."""
    for route in routes:
        ways = tuple(way for way in route.ways if there(way.ifindex))
        if ways or route.kind in NOWHERE:
            yield route._replace(ways=ways)


def _rules(rtnl: Rtnetlink) -> tuple[Rule, ...]:
    """A family that the host's kernel does not have is for the guest as it always is."""
    found = rules.rules(rtnl)
    missing = {AF_INET, AF_INET6} - {rule.family for rule in found}
    return (*found, *(rule for rule in rules.DEFAULT if rule.family in missing))


def _refuse_without_mac(link: Link) -> None:
    packed = bytes.fromhex(link.mac.replace(":", ""))
    if len(packed) != _ETHERNET_BYTES or not any(packed):
        raise NetworkNotMirrored(
            f"interface {link.name} of the pod ({link.kind or 'hardware'}) has no MAC address, so the guest cannot "
            "have its like; give the pod an Ethernet interface, or set internetworking_model to none"
        )


def interface_to_proto(interface: Interface) -> types_pb2.Interface:
    """The interface in the agent's words."""
    from agent_proto.gen import types_pb2

    link = interface.link
    return types_pb2.Interface(
        device=link.name,
        name=link.name,
        IPAddresses=[
            types_pb2.IPAddress(
                family=family_to_proto(address.family), address=address.address, mask=str(address.prefix)
            )
            for address in interface.addresses
        ],
        mtu=link.mtu,
        hwAddr=link.mac,
        type=link.kind,
        raw_flags=link.flags & IFF_NOARP,
    )


def family_to_proto(family: int) -> types_pb2.IPFamily.ValueType:
    """The agent's word for AF_INET or AF_INET6."""
    from agent_proto.gen import types_pb2

    return types_pb2.v6 if family == AF_INET6 else types_pb2.v4
