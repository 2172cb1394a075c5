"""How the guest is told of the pod's routes, rules and neighbours: in the agent's own words as far as these go, and in
those of our extension when the pod has more.

Kata's agent has no extension. What it then lacks is named in the log; only a route or rule that keeps packets away from
somewhere is never left out: a guest that reaches more than its pod may is worse than none.
"""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING

from netlink import rules
from netlink.objects import IFA_F_NOPREFIXROUTE, LINK_LOCAL, full_prefix, network_of, usual_broadcast
from netlink.routes import (
    IPV6_METRIC,
    NOWHERE,
    RT_SCOPE_LINK,
    RT_SCOPE_UNIVERSE,
    RT_TABLE_MAIN,
    RTAX_MTU,
    RTN_THROW,
    RTN_UNICAST,
    RTPROT_KERNEL,
    Route,
    Way,
)
from shim.errors import NetworkNotMirrored
from shim.interfaces import family_to_proto

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from agent_proto.gen import agent_pb2, kata_py_agent_pb2
    from netlink.objects import Address, Neighbour
    from netlink.rules import Rule
    from shim.interfaces import Interface, Snapshot


def beyond_words(snapshot: Snapshot, told: Snapshot) -> list[str]:
    """What the agent's own messages cannot say of it, in people's words; nothing for the networks of most pods."""
    gone = {entry.address for entry in told.neighbours if entry.ifindex in _names(snapshot)} - {
        entry.address for entry in snapshot.neighbours
    }
    found = {
        "rules": _whoever_made(snapshot.rules) != _whoever_made(rules.DEFAULT),
        "attributes of addresses": any(
            _is_special(address, interface)
            for interface in snapshot.interfaces
            for address in interface.addresses
        ),
        "networks without their route": any(_unrouted(snapshot)),
        "neighbours that are gone": bool(gone),
    }
    own = [route for route in snapshot.routes if route.protocol != RTPROT_KERNEL]
    found |= {
        "routing tables": any(route.table != RT_TABLE_MAIN for route in snapshot.routes),
        "kinds of routes": any(route.kind != RTN_UNICAST for route in own),
        "routes with several ways": any(len(route.ways) > 1 for route in own),
        "metrics of routes": any(route.metric != _usual_metric(route) for route in own),
        "attributes of routes": any(map(_has_attributes, own)),
    }
    return [name for name, there in found.items() if there]


def restrictions(snapshot: Snapshot) -> list[str]:
    """The routes and rules that keep packets from going somewhere, as ip(8) would name their destinations."""
    dropped = [
        f"route to {route.destination or 'everywhere'}"
        for route in snapshot.routes
        if route.kind in NOWHERE and route.kind != RTN_THROW
    ]
    return [*dropped, *(f"rule {rule.priority}" for rule in snapshot.rules if rule.action in rules.DROPS)]


def nobodys(snapshot: Snapshot) -> list[str]:
    """The routes and rules that no message of ours can say either: those with a realm or an encapsulation, and what
    kernels after this text have. A route that leads nowhere does so without them too."""
    routes = [
        f"route to {route.destination or 'everywhere'}" for route in snapshot.routes if not _sayable(route)
    ]
    return [*routes, *(f"rule {rule.priority}" for rule in snapshot.rules if rule.rest)]


def refuse_half_told(snapshot: Snapshot) -> None:
    """Raises NetworkNotMirrored for a rule that drops packets and cannot be told."""
    for rule in snapshot.rules:
        if rule.rest and rule.action in rules.DROPS:
            raise NetworkNotMirrored(
                f"rule {rule.priority} of the pod, which is to keep packets away, has conditions that no guest can be "
                "told of: without it the guest reaches more than the pod may; use others, or remove it"
            )


def routes_to_proto(snapshot: Snapshot) -> agent_pb2.Routes:
    """The routes in the agent's words: those of the main table, one for each destination."""
    from agent_proto.gen import agent_pb2, types_pb2

    names = _names(snapshot)
    sayable = (
        route
        for route in snapshot.routes
        if route.table == RT_TABLE_MAIN
        and route.kind == RTN_UNICAST
        and route.protocol != RTPROT_KERNEL
        and route.ifindex != snapshot.loopback
    )
    return agent_pb2.Routes(
        Routes=[
            types_pb2.Route(
                dest=route.destination,
                gateway=route.gateway,
                device=names[route.ifindex],
                source=route.source,
                scope=route.scope,
                family=family_to_proto(route.family),
                flags=route.flags,
                mtu=route.mtu,
            )
            for route in (*_to_peers(snapshot.interfaces), *_best(sayable))
        ]
    )


def neighbours_to_proto(snapshot: Snapshot) -> agent_pb2.ARPNeighbors:
    """The neighbours in the agent's words."""
    from agent_proto.gen import agent_pb2, types_pb2

    names = _names(snapshot)
    return agent_pb2.ARPNeighbors(
        ARPNeighbors=[
            types_pb2.ARPNeighbor(
                toIPAddress=types_pb2.IPAddress(
                    family=family_to_proto(neighbour.family), address=neighbour.address
                ),
                device=names[neighbour.ifindex],
                lladdr=neighbour.mac,
                state=neighbour.state,
                flags=neighbour.flags,
            )
            for neighbour in snapshot.neighbours
        ]
    )


def mirror_to_proto(snapshot: Snapshot) -> kata_py_agent_pb2.MirrorNetworkRequest:
    """All of it in our extension's words."""
    from agent_proto.gen import kata_py_agent_pb2 as pb

    names = _names(snapshot)
    return pb.MirrorNetworkRequest(
        interfaces=[
            pb.MirroredInterface(
                device=interface.link.name, addresses=[_address(address) for address in interface.addresses]
            )
            for interface in snapshot.interfaces
        ],
        routes=[_route(route, names) for route in snapshot.routes if _sayable(route)],
        rules=[_rule(rule) for rule in snapshot.rules if not rule.rest],
        neighbours=[_neighbour(neighbour, names) for neighbour in snapshot.neighbours],
    )


def _sayable(route: Route) -> bool:
    return not route.rest or route.kind in NOWHERE


def _whoever_made(given: Iterable[Rule]) -> set[Rule]:
    """Rules without who made them: that does not make them others."""
    return {rule._replace(protocol=0) for rule in given}


def _usual_metric(route: Route) -> int:
    return IPV6_METRIC if route.family == AF_INET6 else 0


def _has_attributes(route: Route) -> bool:
    foreign = any((":" in way.gateway) != (route.family == AF_INET6) for way in route.ways if way.gateway)
    numbers = {kind for kind, _ in route.metrics} - {RTAX_MTU}
    return bool(foreign or numbers or route.tos or route.origin or route.preference)


def _is_special(address: Address, interface: Interface) -> bool:
    usual = usual_broadcast(address.family, address.address, address.prefix)
    return bool(
        address.peer
        or address.flags
        or address.metric
        or address.label not in ("", interface.link.name)
        or address.broadcast not in ("", usual)
        or (address.family == AF_INET and address.scope != RT_SCOPE_UNIVERSE)
    )


def _unrouted(snapshot: Snapshot) -> Iterator[bool]:
    """For each address, whether somebody has removed the route that the kernel made for its network: plugins do that
    when they move it to another table, and the guest's kernel makes its own."""
    routed = {
        (route.ifindex, route.destination)
        for route in snapshot.routes
        if route.table == RT_TABLE_MAIN and route.protocol == RTPROT_KERNEL
    }
    for interface in snapshot.interfaces:
        for address in interface.addresses:
            if address.prefix == full_prefix(address.family) or address.flags & IFA_F_NOPREFIXROUTE:
                continue
            if not address.address.startswith(LINK_LOCAL):
                network = network_of(address.family, address.peer or address.address, address.prefix)
                yield (address.ifindex, network) not in routed


def _to_peers(interfaces: Iterable[Interface]) -> Iterator[Route]:
    """The kernel makes these for addresses with a peer, which the agent's messages do not know of."""
    for interface in interfaces:
        for address in interface.addresses:
            if address.peer:
                yield Route(
                    address.family,
                    f"{address.peer}/{address.prefix}",
                    (Way(address.ifindex),),
                    scope=RT_SCOPE_LINK if address.family == AF_INET else RT_SCOPE_UNIVERSE,
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


def _address(address: Address) -> kata_py_agent_pb2.MirroredAddress:
    from agent_proto.gen import kata_py_agent_pb2 as pb

    return pb.MirroredAddress(
        address=address.address,
        prefix=address.prefix,
        peer=address.peer,
        broadcast=address.broadcast,
        label=address.label,
        scope=address.scope,
        flags=address.flags,
        metric=address.metric,
    )


def _route(route: Route, names: dict[int, str]) -> kata_py_agent_pb2.MirroredRoute:
    from agent_proto.gen import kata_py_agent_pb2 as pb

    return pb.MirroredRoute(
        v6=route.family == AF_INET6,
        destination=route.destination,
        origin=route.origin,
        tos=route.tos,
        table=route.table,
        kind=route.kind,
        scope=route.scope,
        protocol=route.protocol,
        metric=route.metric,
        source=route.source,
        preference=route.preference,
        ways=[
            pb.MirroredWay(device=names[way.ifindex], gateway=way.gateway, flags=way.flags, weight=way.weight)
            for way in route.ways
        ],
        metrics=dict(route.metrics),
    )


def _rule(rule: Rule) -> kata_py_agent_pb2.MirroredRule:
    from agent_proto.gen import kata_py_agent_pb2 as pb

    return pb.MirroredRule(
        v6=rule.family == AF_INET6,
        priority=rule.priority,
        action=rule.action,
        table=rule.table,
        source=rule.source,
        destination=rule.destination,
        incoming=rule.incoming,
        outgoing=rule.outgoing,
        invert=rule.invert,
        tos=rule.tos,
        mark=rule.mark,
        mask=rule.mask,
        goto=rule.goto,
        suppress_prefix=rule.suppress_prefix,
        suppress_group=rule.suppress_group,
        ip_protocol=rule.ip_protocol,
        source_ports=_range(rule.source_ports),
        destination_ports=_range(rule.destination_ports),
        users=_range(rule.users),
        protocol=rule.protocol,
    )


def _range(pair: tuple[int, int] | None) -> kata_py_agent_pb2.MirroredRange | None:
    from agent_proto.gen import kata_py_agent_pb2 as pb

    return None if pair is None else pb.MirroredRange(first=pair[0], last=pair[1])


def _neighbour(neighbour: Neighbour, names: dict[int, str]) -> kata_py_agent_pb2.MirroredNeighbour:
    from agent_proto.gen import kata_py_agent_pb2 as pb

    return pb.MirroredNeighbour(
        device=names[neighbour.ifindex],
        address=neighbour.address,
        mac=neighbour.mac,
        state=neighbour.state,
        flags=neighbour.flags,
    )


def _names(snapshot: Snapshot) -> dict[int, str]:
    names = {interface.link.ifindex: interface.link.name for interface in snapshot.interfaces}
    return {**names, snapshot.loopback: "lo"} if snapshot.loopback else names
