"""Addresses, routes, rules and neighbours as the pod's network namespace has them, with all their attributes.

Everything is looked at before the first order is given. What is there already stays untouched; what an earlier call has
made, and this one no longer names, goes; what containers have made by themselves stays. Loaded with the first call.
"""

from __future__ import annotations

import errno
from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from guest_agent.errors import InvalidRequest, NotFound
from netlink import rules
from netlink.objects import (
    IFA_F_DEPRECATED,
    LINK_LOCAL,
    NUD_PERMANENT,
    Address,
    Neighbour,
    full_prefix,
    in_order_of_making,
    mac_bytes,
)
from netlink.routes import (
    IPV6_METRIC,
    NOWHERE,
    ONLINK,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTN_LOCAL,
    RTN_UNICAST,
    RTPROT_BOOT,
    RTPROT_KERNEL,
    Route,
    Way,
)
from netlink.rtnl import Rtnetlink
from netlink.rules import Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from agent_proto.gen import kata_py_agent_pb2 as pb

T = TypeVar("T", Address, Neighbour, Route, Rule)

#: How much of each a guest takes.
MAX_INTERFACES, MAX_ADDRESSES, MAX_ROUTES, MAX_WAYS, MAX_RULES, MAX_NEIGHBOURS = (
    256,
    4096,
    16384,
    256,
    4096,
    16384,
)
_MAX_NUMBER_OF_METRIC = 17
_NAME_BYTES = 15
_BYTE, _SHORT, _WORD = 0xFF, 0xFFFF, 0xFFFFFFFF
_UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)
_IT_IS_GONE = (errno.ESRCH, errno.ENOENT, errno.EADDRNOTAVAIL, errno.ENODEV)


class Wanted(NamedTuple):
    """What a request asks for; `interfaces` are the indices of those that are the host's."""

    interfaces: frozenset[int] = frozenset()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()


class NetworkMirror:
    """Remembers what it has made, so that it knows what is the containers' own. What was made by the protocol's own
    messages before the first call it takes over."""

    def __init__(self) -> None:
        self._first = True
        self._made = Wanted()

    def update(self, request: pb.MirrorNetworkRequest) -> None:
        """Make it so. Raises InvalidRequest, NotFound, OSError."""
        with Rtnetlink() as rtnl:
            links = {link.name: link.ifindex for link in rtnl.links()}
            wanted = _wanted(request, links)
            # Whatever of it has been made when something fails is known the next time.
            made, self._made = self._made, _both(self._made, wanted)
            if self._first:
                made = _both(made, _taken_over(rtnl, wanted.interfaces))
            _set_addresses(rtnl, wanted)
            _set_neighbours(rtnl, wanted, made)
            _set_routes(rtnl, wanted, made)
            _set_rules(rtnl, wanted, made)
        self._first, self._made = False, wanted


def _both(one: Wanted, other: Wanted) -> Wanted:
    """Each once: what fails again and again would otherwise be remembered as often."""
    return Wanted(
        routes=tuple(dict.fromkeys((*one.routes, *other.routes))),
        rules=tuple(dict.fromkeys((*one.rules, *other.rules))),
        neighbours=tuple(dict.fromkeys((*one.neighbours, *other.neighbours))),
    )


def _taken_over(rtnl: Rtnetlink, interfaces: frozenset[int]) -> Wanted:
    """What the protocol's own messages make, and the kernel's own rules."""
    return Wanted(
        routes=tuple(route for route in rtnl.routes() if _is_plain(route)),
        rules=rules.DEFAULT,
        neighbours=tuple(_permanent(rtnl, interfaces)),
    )


def _set_routes(rtnl: Rtnetlink, wanted: Wanted, made: Wanted) -> None:
    ours, kept = set(made.routes), set(wanted.routes)
    for route in rtnl.routes():
        if route not in kept and (route in ours or _is_of_an_address(route, wanted.interfaces)):
            _end(rtnl.delete_route, route, _route_name(route))
    # Some went with an address, or with another route of their destination.
    there = set(rtnl.routes())
    missing = [route for route in wanted.routes if route not in there]
    # A gateway has to be reachable before a route may lead there.
    for route in sorted(missing, key=lambda route: bool(route.gateway)):
        _make_route(rtnl, route)


def _make_route(rtnl: Rtnetlink, route: Route) -> None:
    """Make a route, also one whose gateway cannot be reached any more: when it was made on the host, it could be."""
    try:
        _make(rtnl.append_route, route, _route_name(route))
    except OSError as err:
        if err.errno not in _UNREACHABLE:
            raise
        hops = [_to_gateway(way) for way in route.ways if way.gateway]
        before = rtnl.routes()
        ours = [hop for hop in dict.fromkeys(hops) if hop not in before]
        try:
            for hop in ours:
                _make(rtnl.append_route, hop, _route_name(hop))
            _make(rtnl.append_route, route, _route_name(route))
        finally:
            for hop in ours:
                _end(rtnl.delete_route, hop, _route_name(hop))


def _to_gateway(way: Way) -> Route:
    """A route of the main table to a gateway, as if it were on the link."""
    family = AF_INET6 if ":" in way.gateway else AF_INET
    scope, metric = (RT_SCOPE_UNIVERSE, IPV6_METRIC) if family == AF_INET6 else (RT_SCOPE_LINK, 0)
    destination = f"{way.gateway}/{full_prefix(family)}"
    return Route(family, destination, (Way(way.ifindex),), scope=scope, metric=metric)


def _set_rules(rtnl: Rtnetlink, wanted: Wanted, made: Wanted) -> None:
    there = set(rules.rules(rtnl))
    for rule in there.intersection(made.rules).difference(wanted.rules):
        _end(lambda rule: rules.delete(rtnl, rule), rule, f"rule {rule.priority}")
    for rule in wanted.rules:
        if rule not in there:
            _make(lambda rule: rules.add(rtnl, rule), rule, f"rule {rule.priority}")


def _set_neighbours(rtnl: Rtnetlink, wanted: Wanted, made: Wanted) -> None:
    there = set(_permanent(rtnl, wanted.interfaces))
    places = {(entry.ifindex, entry.address) for entry in wanted.neighbours}
    for entry in there.intersection(made.neighbours):
        if (entry.ifindex, entry.address) not in places:
            _end(rtnl.delete_neighbour, entry, f"neighbour {entry.address}")
    for entry in wanted.neighbours:
        if entry not in there:
            _make(rtnl.add_neighbour, entry, f"neighbour {entry.address}")


def _permanent(rtnl: Rtnetlink, interfaces: frozenset[int]) -> Iterator[Neighbour]:
    for entry in rtnl.neighbours():
        if entry.ifindex in interfaces and entry.state & NUD_PERMANENT:
            yield entry


def _set_addresses(rtnl: Rtnetlink, wanted: Wanted) -> None:
    here = {address.key: address for address in rtnl.addresses() if address.ifindex in wanted.interfaces}
    keys = {address.key for address in wanted.addresses}
    for key, address in here.items():
        if key not in keys and not address.address.startswith(LINK_LOCAL):
            _end(rtnl.delete_address, address, f"address {address.address}")
    for address in wanted.addresses:
        old = here.get(address.key)
        if old is not None and old != address and _settled(old) != _settled(address):
            _end(rtnl.delete_address, old, f"address {address.address}")
    # With the first address of a network the kernel has removed the others of it.
    there = {address.key: address for address in rtnl.addresses()}
    for address in in_order_of_making(wanted.addresses):
        if there.get(address.key) != address:
            _make(rtnl.add_address, address, f"address {address.address}/{address.prefix}")


def _settled(address: Address) -> Address:
    """Without what can be changed while an address is there."""
    return address._replace(flags=address.flags & ~IFA_F_DEPRECATED)


def _is_plain(route: Route) -> bool:
    """Whether it is what UpdateRoutes makes."""
    return route.table == RT_TABLE_MAIN and route.protocol == RTPROT_BOOT and route.kind == RTN_UNICAST


def _is_of_an_address(route: Route, interfaces: frozenset[int]) -> bool:
    """Whether the kernel has made it for an address that the host gave: there somebody may have removed it."""
    return (
        route.protocol == RTPROT_KERNEL
        and route.kind == RTN_UNICAST
        and route.table == RT_TABLE_MAIN
        and route.ifindex in interfaces
        and not route.destination.startswith(LINK_LOCAL)
    )


def _route_name(route: Route) -> str:
    where = "" if route.table == RT_TABLE_MAIN else f" in table {route.table}"
    return f"route to {route.destination or 'everywhere'}{where}"


def _make(order: Callable[[T], None], thing: T, what: str) -> None:
    """Give an order to make something, which may be there, and name it when it cannot be."""
    try:
        order(thing)
    except ValueError as err:
        raise InvalidRequest(f"{what}: {err}") from err
    except OSError as err:
        if err.errno != errno.EEXIST:
            raise OSError(err.errno, f"{what}: {err.strerror or err}") from err


def _end(order: Callable[[T], None], thing: T, what: str) -> None:
    """Give an order to remove something, which may have gone by itself."""
    try:
        order(thing)
    except OSError as err:
        if err.errno not in _IT_IS_GONE:
            raise OSError(err.errno, f"{what}: {err.strerror or err}") from err


# What a request may say


def _wanted(request: pb.MirrorNetworkRequest, links: dict[str, int]) -> Wanted:
    addresses = [address for interface in request.interfaces for address in interface.addresses]
    for what, entries, most in (
        ("interfaces", request.interfaces, MAX_INTERFACES),
        ("addresses", addresses, MAX_ADDRESSES),
        ("routes", request.routes, MAX_ROUTES),
        ("rules", request.rules, MAX_RULES),
        ("neighbours", request.neighbours, MAX_NEIGHBOURS),
    ):
        _bound(what, entries, most)
    return Wanted(
        frozenset(_index(interface.device, links) for interface in request.interfaces),
        tuple(
            _address(_index(interface.device, links), address)
            for interface in request.interfaces
            for address in interface.addresses
        ),
        tuple(dict.fromkeys(_route(entry, links) for entry in request.routes)),
        tuple(dict.fromkeys(map(_rule, request.rules))),
        tuple(dict.fromkeys(_neighbour(entry, links) for entry in request.neighbours)),
    )


def _address(ifindex: int, entry: pb.MirroredAddress) -> Address:
    where = f"address {entry.address}"
    family = _family_of(entry.address, where)
    for other in (entry.peer, entry.broadcast):
        if other:
            _check_address(family, other, where)
    if entry.prefix > full_prefix(family):
        raise InvalidRequest(f"{where}: {entry.prefix} is no length of a prefix")
    _within(where, scope=(entry.scope, _BYTE))
    return Address(
        ifindex,
        family,
        entry.address,
        entry.prefix,
        entry.peer,
        entry.broadcast,
        _name(entry.label, where),
        entry.scope,
        entry.flags,
        entry.metric,
    )


def _route(entry: pb.MirroredRoute, links: dict[str, int]) -> Route:
    family = AF_INET6 if entry.v6 else AF_INET
    where = f"route to {entry.destination or 'everywhere'}"
    if entry.kind not in (RTN_UNICAST, RTN_LOCAL, *NOWHERE):
        raise InvalidRequest(f"{where}: {entry.kind} is no kind of routes that a guest has")
    if bool(entry.ways) != (entry.kind not in NOWHERE):
        raise InvalidRequest(f"{where}: want a way for what leads somewhere, and none for what does not")
    _bound(f"{where}: ways", entry.ways, MAX_WAYS)
    _within(
        where,
        tos=(entry.tos, _BYTE),
        scope=(entry.scope, _BYTE),
        protocol=(entry.protocol, _BYTE),
        preference=(entry.preference, _BYTE),
    )
    if entry.table == 0:
        raise InvalidRequest(f"{where}: want a table")
    for number in entry.metrics:
        if not 0 < number <= _MAX_NUMBER_OF_METRIC:
            raise InvalidRequest(f"{where}: {number} is no metric")
    if entry.source:
        _check_address(family, entry.source, where)
    return Route(
        family,
        _prefix(family, entry.destination, where),
        tuple(_way(family, way, links, where) for way in entry.ways),
        entry.source,
        entry.scope,
        entry.protocol,
        entry.metric,
        tuple(sorted(entry.metrics.items())),
        entry.table,
        entry.kind,
        entry.tos,
        _prefix(family, entry.origin, where),
        entry.preference,
    )


def _way(family: int, way: pb.MirroredWay, links: dict[str, int], where: str) -> Way:
    if not 1 <= way.weight <= 256:
        raise InvalidRequest(f"{where}: a way weighs 1 to 256, not {way.weight}")
    if way.flags & ~ONLINK:
        raise InvalidRequest(f"{where}: {way.flags:#x} are no flags of a way")
    if way.gateway:  # an IPv4 route's may have an IPv6 address
        _check_address(AF_INET6 if ":" in way.gateway else family, way.gateway, where)
    return Way(_index(way.device, links), way.gateway, way.flags, way.weight)


def _rule(entry: pb.MirroredRule) -> Rule:
    family = AF_INET6 if entry.v6 else AF_INET
    where = f"rule {entry.priority}"
    if entry.action not in rules.ACTIONS:
        raise InvalidRequest(f"{where}: {entry.action} is no action of rules that a guest has")
    _within(
        where,
        tos=(entry.tos, _BYTE),
        ip_protocol=(entry.ip_protocol, _BYTE),
        protocol=(entry.protocol, _BYTE),
    )
    return Rule(
        family,
        entry.priority,
        entry.action,
        entry.table,
        _prefix(family, entry.source, where),
        _prefix(family, entry.destination, where),
        _name(entry.incoming, where),
        _name(entry.outgoing, where),
        entry.invert,
        entry.tos,
        entry.mark,
        entry.mask,
        entry.goto,
        entry.suppress_prefix if entry.HasField("suppress_prefix") else None,
        entry.suppress_group if entry.HasField("suppress_group") else None,
        entry.ip_protocol,
        _range(entry.source_ports, _SHORT, where) if entry.HasField("source_ports") else None,
        _range(entry.destination_ports, _SHORT, where) if entry.HasField("destination_ports") else None,
        _range(entry.users, _WORD, where) if entry.HasField("users") else None,
        entry.protocol,
    )


def _neighbour(entry: pb.MirroredNeighbour, links: dict[str, int]) -> Neighbour:
    where = f"neighbour {entry.address} of {entry.device}"
    try:
        mac = mac_bytes(entry.mac).hex(":")
    except ValueError as err:
        raise InvalidRequest(f"{where}: {err}") from None
    _within(where, state=(entry.state, _SHORT), flags=(entry.flags, _BYTE))
    family = _family_of(entry.address, where)
    return Neighbour(_index(entry.device, links), family, entry.address, mac, entry.state, entry.flags)


def _range(entry: pb.MirroredRange, most: int, where: str) -> tuple[int, int]:
    if not entry.first <= entry.last <= most:
        raise InvalidRequest(f"{where}: {entry.first} to {entry.last} is no range up to {most}")
    return entry.first, entry.last


def _prefix(family: int, text: str, where: str) -> str:
    if not text:
        return ""
    address, _, bits = text.partition("/")
    _check_address(family, address, where)
    if not bits.isdecimal() or int(bits) > full_prefix(family):
        raise InvalidRequest(f"{where}: {bits!r} is no length of a prefix")
    return text


def _family_of(address: str, where: str) -> int:
    family = AF_INET6 if ":" in address else AF_INET
    _check_address(family, address, where)
    return family


def _check_address(family: int, address: str, where: str) -> None:
    try:
        inet_pton(family, address)
    except (OSError, ValueError):
        raise InvalidRequest(f"{where}: {address!r} is no address of its family") from None


def _name(text: str, where: str) -> str:
    if len(text.encode()) > _NAME_BYTES:
        raise InvalidRequest(f"{where}: {text!r} is no name of an interface: it has 1 to {_NAME_BYTES} bytes")
    return text


def _index(device: str, links: dict[str, int]) -> int:
    if device not in links:
        raise NotFound(f"there is no interface {device!r}")
    return links[device]


def _within(where: str, **fields: tuple[int, int]) -> None:
    for name, (value, most) in fields.items():
        if value > most:
            raise InvalidRequest(f"{where}: {name}: want at most {most}, got {value}")


def _bound(what: str, entries: Sequence[object], most: int) -> None:
    if len(entries) > most:
        raise InvalidRequest(f"{len(entries)} {what} are more than a guest takes: {most}")
