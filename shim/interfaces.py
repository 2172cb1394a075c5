"""What a pod's network namespace has, and how the guest is told of it. Nothing here changes anything.

Whatever kind an interface is of, the guest gets a virtio one with its MAC address, name, MTU and addresses: how the
packets come to the interface is the host's business.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, NamedTuple

from netlink.objects import (
    IFF_LOOPBACK,
    IFF_NOARP,
    IFF_UP,
    NUD_PERMANENT,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    RTPROT_BOOT,
    RTPROT_KERNEL,
    RTPROT_RA,
    Route,
)
from shim.errors import NetworkNotMirrored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent_proto.gen import agent_pb2, types_pb2
    from netlink.objects import Address, Link, Neighbour
    from netlink.rtnl import Rtnetlink

#: What the names of our taps end with, as Kata's do.
TAP_SUFFIX = "_kata"
# The agent's messages know of a route's flags only RTNH_F_ONLINK, <linux/rtnetlink.h>; the others tell a state.
_ONLINK = 4
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
    """All that the guest shall have, at one moment."""

    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()

    def without(self, interface: Interface) -> Snapshot:
        """The rest, when an interface is not there."""
        gone = interface.link.ifindex
        return Snapshot(
            tuple(other for other in self.interfaces if other.key != interface.key),
            tuple(route for route in self.routes if route.ifindex != gone),
            tuple(neighbour for neighbour in self.neighbours if neighbour.ifindex != gone),
        )


def scan(rtnl: Rtnetlink) -> Snapshot:
    """What the namespace of the socket has now.

    Interfaces that are down are not the pod's: the kernel itself puts some into every namespace.

    Raises:
        NetworkNotMirrored: an interface that no Ethernet device can stand for.
        OSError: the kernel does not answer.
    """
    addresses = rtnl.addresses()
    interfaces = tuple(
        Interface(link, tuple(address for address in addresses if address.ifindex == link.ifindex))
        for link in map(_usable, rtnl.links())
        if link.flags & IFF_UP and not link.flags & IFF_LOOPBACK and not link.name.endswith(TAP_SUFFIX)
    )
    for interface in interfaces:
        _refuse_without_mac(interface.link)
    there = {interface.link.ifindex for interface in interfaces}
    routes = (
        route
        for route in rtnl.routes()
        if route.protocol not in (RTPROT_KERNEL, RTPROT_RA) and route.ifindex in there
    )
    neighbours = (
        neighbour
        for neighbour in rtnl.neighbours()
        if neighbour.state & NUD_PERMANENT and neighbour.ifindex in there and neighbour.mac
    )
    return Snapshot(interfaces, (*_to_peers(interfaces), *_best(routes)), tuple(neighbours))


def _usable(link: Link) -> Link:
    """No guest's interface comes up with NO_MAC."""
    if link.mac == NO_MAC and link.flags & IFF_NOARP:
        return link._replace(mac=mac_in_place(link.ifindex))
    return link


def _to_peers(interfaces: Iterable[Interface]) -> Iterator[Route]:
    """The kernel makes these for addresses with a peer, which the guest's addresses do not have."""
    for interface in interfaces:
        for address in interface.addresses:
            if address.peer:
                yield Route(
                    family=address.family,
                    destination=f"{address.peer}/{address.prefix}",
                    gateway="",
                    ifindex=address.ifindex,
                    source="",
                    scope=RT_SCOPE_LINK if address.family == AF_INET else RT_SCOPE_UNIVERSE,
                    protocol=RTPROT_BOOT,
                    flags=0,
                    metric=0,
                    mtu=0,
                )


def _best(routes: Iterable[Route]) -> Iterator[Route]:
    """Of several routes to the same place the one with the lowest metric: the agent's messages have no metrics, and in
    the guest the last one would be in the place of the others."""
    best: dict[tuple[int, str], Route] = {}
    for route in routes:
        place = route.family, route.destination
        if place not in best or route.metric < best[place].metric:
            best[place] = route
    return iter(best.values())


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
                family=_family(address.family), address=address.address, mask=str(address.prefix)
            )
            for address in interface.addresses
        ],
        mtu=link.mtu,
        hwAddr=link.mac,
        type=link.kind,
        raw_flags=link.flags & IFF_NOARP,
    )


def routes_to_proto(snapshot: Snapshot) -> agent_pb2.Routes:
    """The routes in the agent's words."""
    from agent_proto.gen import agent_pb2, types_pb2

    names = _names(snapshot.interfaces)
    return agent_pb2.Routes(
        Routes=[
            types_pb2.Route(
                dest=route.destination,
                gateway=route.gateway,
                device=names[route.ifindex],
                source=route.source,
                scope=route.scope,
                family=_family(route.family),
                flags=route.flags & _ONLINK,
                mtu=route.mtu,
            )
            for route in snapshot.routes
        ]
    )


def neighbours_to_proto(snapshot: Snapshot) -> agent_pb2.ARPNeighbors:
    """The neighbours in the agent's words."""
    from agent_proto.gen import agent_pb2, types_pb2

    names = _names(snapshot.interfaces)
    return agent_pb2.ARPNeighbors(
        ARPNeighbors=[
            types_pb2.ARPNeighbor(
                toIPAddress=types_pb2.IPAddress(family=_family(neighbour.family), address=neighbour.address),
                device=names[neighbour.ifindex],
                lladdr=neighbour.mac,
                state=neighbour.state,
                flags=neighbour.flags,
            )
            for neighbour in snapshot.neighbours
        ]
    )


def _names(interfaces: Iterable[Interface]) -> dict[int, str]:
    return {interface.link.ifindex: interface.link.name for interface in interfaces}


def _family(family: int) -> types_pb2.IPFamily.ValueType:
    from agent_proto.gen import types_pb2

    return types_pb2.v6 if family == AF_INET6 else types_pb2.v4
