"""The guest's network as the host describes it: interfaces, routes, neighbours. Loaded when the host tells of one.

The host names an interface by its MAC address, and it may not be there yet: the driver has to find it first.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, TypeVar

from agent_proto.gen import agent_pb2, types_pb2
from guest_agent.errors import InvalidRequest, NotFound
from netlink.objects import (
    IFF_NOARP,
    LINK_LOCAL,
    NUD_PERMANENT,
    Address,
    Link,
    Neighbour,
    in_order_of_making,
    usual_broadcast,
)
from netlink.routes import RT_TABLE_MAIN, RTAX_MTU, RTN_UNICAST, RTPROT_BOOT, Route, Way
from netlink.rtnl import Rtnetlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

T = TypeVar("T", Address, Neighbour, Route)

_NAME_BYTES = 15
_FAMILIES = {types_pb2.v4: AF_INET, types_pb2.v6: AF_INET6}


def find(mac: str) -> Link | None:
    """The interface with this MAC address, if it is there by now."""
    with Rtnetlink() as rtnl:
        return next((link for link in rtnl.links() if link.mac == mac), None)


def update_interface(wanted: types_pb2.Interface) -> types_pb2.Interface:
    """Give the interface with that MAC address the name, MTU and addresses of the description, and those only.

    An address that is there already keeps what else is said of it (`guest_agent.routing`).
    The link-local IPv6 address that the kernel itself made stays. Raises InvalidRequest, NotFound, OSError.
    """
    name = wanted.name
    if not 0 < len(name.encode()) <= _NAME_BYTES or "/" in name or name in (".", ".."):
        raise InvalidRequest(f"{name!r} is no name for an interface: it has 1 to {_NAME_BYTES} bytes")
    with Rtnetlink() as rtnl:
        links = rtnl.links()
        link = next((link for link in links if link.mac == wanted.hwAddr.lower()), None)
        if link is None:
            raise NotFound(f"there is no interface with the address {wanted.hwAddr}")
        if link.name != name:
            _rename(rtnl, link, name, links)
        if wanted.mtu and wanted.mtu != link.mtu:
            rtnl.set_link(link.ifindex, mtu=wanted.mtu)
        _set_addresses(rtnl, link.ifindex, [_address(link.ifindex, entry) for entry in wanted.IPAddresses])
        rtnl.set_link(link.ifindex, up=True, arp=not wanted.raw_flags & IFF_NOARP)
        return next(_described(rtnl, lambda other: other.ifindex == link.ifindex))


def interfaces() -> agent_pb2.Interfaces:
    """All interfaces. Raises OSError."""
    with Rtnetlink() as rtnl:
        return agent_pb2.Interfaces(Interfaces=_described(rtnl, lambda link: True))


def update_routes(wanted: Iterable[types_pb2.Route]) -> agent_pb2.Routes:
    """Replace all routes of the main table but those that the kernel itself makes for addresses. Returns what there is
    then.

    Raises InvalidRequest, NotFound, OSError.
    """
    with Rtnetlink() as rtnl:
        links = {link.name: link for link in rtnl.links()}
        routes = [_route(entry, links) for entry in wanted]
        for old in _plain_routes(rtnl):
            if old.protocol == RTPROT_BOOT:
                rtnl.delete_route(old)
        # A gateway has to be reachable before a route may lead there.
        for route in sorted(routes, key=lambda route: bool(route.gateway)):
            _tell(rtnl.add_route, route, f"route to {route.destination or 'everywhere'}")
    return current_routes()


def current_routes() -> agent_pb2.Routes:
    """All routes. Raises OSError."""
    with Rtnetlink() as rtnl:
        names = {link.ifindex: link.name for link in rtnl.links()}
        return agent_pb2.Routes(
            Routes=[
                types_pb2.Route(
                    dest=route.destination,
                    gateway=route.gateway,
                    device=names.get(route.ifindex, ""),
                    source=route.source,
                    scope=route.scope,
                    family=types_pb2.v6 if route.family == AF_INET6 else types_pb2.v4,
                    flags=route.flags,
                    mtu=route.mtu,
                )
                for route in _plain_routes(rtnl)
            ]
        )


def _plain_routes(rtnl: Rtnetlink) -> list[Route]:
    """Those that the protocol's messages know: of the main table, and leading somewhere."""
    return [route for route in rtnl.routes() if route.table == RT_TABLE_MAIN and route.kind == RTN_UNICAST]


def add_neighbours(wanted: Iterable[types_pb2.ARPNeighbor]) -> None:
    """Add entries, in place of those with the same address. Raises InvalidRequest, NotFound, OSError."""
    with Rtnetlink() as rtnl:
        links = {link.name: link for link in rtnl.links()}
        for entry in wanted:
            address = entry.toIPAddress
            neighbour = Neighbour(
                _index(entry.device, links),
                _FAMILIES[address.family],
                address.address,
                entry.lladdr,
                entry.state or NUD_PERMANENT,
                entry.flags,
            )
            _tell(rtnl.add_neighbour, neighbour, f"neighbour {address.address} of {entry.device}")


def _rename(rtnl: Rtnetlink, link: Link, name: str, links: Sequence[Link]) -> None:
    holder = next((other for other in links if other.name == name), None)
    if holder is not None:
        # It gets its own name later: names of several interfaces may change places.
        rtnl.set_link(holder.ifindex, up=False)
        rtnl.set_link(holder.ifindex, name=f"unnamed{holder.ifindex}")
    rtnl.set_link(link.ifindex, up=False)
    rtnl.set_link(link.ifindex, name=name)


def _set_addresses(rtnl: Rtnetlink, ifindex: int, wanted: Sequence[Address]) -> None:
    keys = {address.key for address in wanted}
    there = _addresses(rtnl, ifindex)
    surplus = [
        address for address in there if address.key not in keys and not address.address.startswith(LINK_LOCAL)
    ]
    for address in surplus:
        rtnl.delete_address(address)
    if surplus:
        # With the first address of a network the kernel has removed the others of it.
        there = _addresses(rtnl, ifindex)
    here = {address.key for address in there}
    for address in in_order_of_making(wanted):
        if address.key not in here:
            _tell(rtnl.add_address, address, f"address {address.address}/{address.prefix}")


def _addresses(rtnl: Rtnetlink, ifindex: int) -> list[Address]:
    return [address for address in rtnl.addresses() if address.ifindex == ifindex]


def _address(ifindex: int, entry: types_pb2.IPAddress) -> Address:
    family = _FAMILIES[entry.family]
    if not entry.mask.isdecimal() or int(entry.mask) > (32 if family == AF_INET else 128):
        raise InvalidRequest(f"address {entry.address}: {entry.mask!r} is no length of a prefix")
    prefix = int(entry.mask)
    try:
        broadcast = usual_broadcast(family, entry.address, prefix)
    except OSError as err:
        raise InvalidRequest(f"address {entry.address}/{prefix}: {err}") from err
    return Address(ifindex, family, entry.address, prefix, broadcast=broadcast)


def _route(entry: types_pb2.Route, links: dict[str, Link]) -> Route:
    return Route(
        family=_FAMILIES[entry.family],
        destination=entry.dest,
        ways=(Way(_index(entry.device, links) if entry.device else 0, entry.gateway, entry.flags),),
        source=entry.source,
        scope=entry.scope,
        metrics=((RTAX_MTU, entry.mtu),) if entry.mtu else (),
    )


def _index(device: str, links: dict[str, Link]) -> int:
    if device not in links:
        raise NotFound(f"there is no interface {device!r}")
    return links[device].ifindex


def _tell(order: Callable[[T], None], thing: T, what: str) -> None:
    """Give an order, and name what it was about when it cannot be."""
    try:
        order(thing)
    except ValueError as err:
        raise InvalidRequest(f"{what}: {err}") from err
    except OSError as err:
        raise OSError(err.errno, f"{what}: {err.strerror or err}") from err


def _described(rtnl: Rtnetlink, wanted: Callable[[Link], bool]) -> Iterator[types_pb2.Interface]:
    addresses = rtnl.addresses()
    for link in filter(wanted, rtnl.links()):
        yield types_pb2.Interface(
            device=link.name,
            name=link.name,
            IPAddresses=[
                types_pb2.IPAddress(
                    family=types_pb2.v6 if address.family == AF_INET6 else types_pb2.v4,
                    address=address.address,
                    mask=str(address.prefix),
                )
                for address in addresses
                if address.ifindex == link.ifindex
            ],
            mtu=link.mtu,
            hwAddr=link.mac,
            type=link.kind,
            raw_flags=link.flags & IFF_NOARP,
        )
