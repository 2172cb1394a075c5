"""What of a network namespace is the pod's, and the agent's words for it."""

from __future__ import annotations

import socket
import subprocess
from typing import Any, cast

import pytest

from netlink.objects import IFF_NOARP, IFF_UP, Link
from netlink.rtnl import Rtnetlink
from shim.errors import NetworkNotMirrored
from shim.interfaces import NO_MAC, Snapshot, interface_to_proto, scan
from shim.routing import (
    beyond_words,
    neighbours_to_proto,
    nobodys,
    refuse_half_told,
    restrictions,
    routes_to_proto,
)
from tests.support.namespaces import in_network_namespace


def setup(*orders: str) -> Snapshot:
    for order in orders:
        subprocess.run(["ip", *order.split()], check=True)
    with Rtnetlink() as rtnl:
        return scan(rtnl)


def test_an_ordinary_pod() -> None:
    def work() -> None:
        snapshot = setup(
            "link set lo up",
            "link add eth0 address 0a:58:0a:d5:00:02 mtu 1450 type veth peer name far",
            "link set eth0 up",
            "address add 10.1.0.2/24 dev eth0",
            "address add fd00::2/64 dev eth0 nodad",
            "route add default via 10.1.0.1",
            "route add 10.7.0.0/16 via 10.9.9.9 dev eth0 onlink mtu 1300",
            "neighbour add 10.1.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
            "neighbour add 10.1.0.5 lladdr 02:00:00:00:00:05 dev eth0 nud reachable",
        )
        (eth0,) = snapshot.interfaces
        told = interface_to_proto(eth0)
        assert (told.name, told.device, told.mtu, told.hwAddr, told.type) == (
            *("eth0", "eth0", 1450, "0a:58:0a:d5:00:02", "veth"),
        )
        assert {(a.address, a.mask) for a in told.IPAddresses} >= {("10.1.0.2", "24"), ("fd00::2", "64")}
        assert [(r.dest, r.gateway, r.device, r.flags, r.mtu) for r in routes_to_proto(snapshot).Routes] == [
            ("", "10.1.0.1", "eth0", 0, 0),
            ("10.7.0.0/16", "10.9.9.9", "eth0", 4, 1300),
        ]
        (neighbour,) = neighbours_to_proto(snapshot).ARPNeighbors
        assert (neighbour.toIPAddress.address, neighbour.device, neighbour.lladdr, neighbour.state) == (
            *("10.1.0.1", "eth0", "02:00:00:00:00:01", 0x80),
        )

    in_network_namespace(work)


@pytest.mark.parametrize(
    ("orders", "names"),
    [
        ([], []),
        (["link set lo up", "address add 10.3.0.1/32 dev lo"], []),
        (["link add name eth1 type veth peer name eth2", "link set eth1 up"], ["eth1"]),
        (
            ["link add name eth1 type veth peer name eth2", "link set eth1 up", "link set eth2 up"],
            ["eth1", "eth2"],
        ),
        (["link add name eth1 type bridge", "link set eth1 up"], ["eth1"]),
        (
            [
                *("link add name eth1 type veth peer name eth2", "link set eth1 up"),
                *("link add link eth1 name mac0 type macvlan mode bridge", "link set mac0 up"),
                *("tuntap add tap1_kata mode tap", "link set tap1_kata up"),
            ],
            ["eth1", "mac0"],
        ),
    ],
    ids=["nothing", "loopback", "no address", "two", "bridge", "macvlan and a tap of ours"],
)
def test_which_interfaces_are_the_pods(orders: list[str], names: list[str]) -> None:
    def work() -> None:
        assert sorted(interface.link.name for interface in setup(*orders).interfaces) == names

    in_network_namespace(work)


def test_an_interface_without_a_mac_address_is_named() -> None:
    def work() -> None:
        with pytest.raises(NetworkNotMirrored, match=r"interface wg0 of the pod \(tun\) has no MAC address"):
            setup("tuntap add wg0 mode tun", "link set wg0 up")

    in_network_namespace(work)


class Told:
    """A kernel that has these links and nothing else."""

    def __init__(self, *links: Link) -> None:
        self._links = list(links)

    def links(self) -> list[Link]:
        return self._links

    def nothing(self, *asked: object) -> list[Any]:
        return []

    addresses = routes = neighbours = dump = nothing


@pytest.mark.parametrize("ifindex", [2, 0x7FFFFFFF])
def test_a_netkit_in_its_l3_mode_gets_a_mac_address(ifindex: int) -> None:
    netkit = Link(ifindex, "eth0", NO_MAC, 1500, IFF_UP | IFF_NOARP, "netkit")
    (interface,) = scan(cast("Rtnetlink", Told(netkit))).interfaces
    first, *rest = bytes.fromhex(interface.link.mac.replace(":", ""))
    assert first & 0b11 == 0b10  # one machine's, and of no maker
    assert int.from_bytes(bytes(rest), "big") == ifindex
    told = interface_to_proto(interface)
    assert (told.hwAddr, told.raw_flags) == (interface.link.mac, IFF_NOARP)
    asking = netkit._replace(flags=IFF_UP)
    with pytest.raises(NetworkNotMirrored, match=r"eth0 of the pod \(netkit\) has no MAC address"):
        scan(cast("Rtnetlink", Told(asking)))


TWO = (
    "link add eth0 address 0a:58:0a:d5:00:02 type veth peer name far0",
    "link add eth1 address 0a:58:0a:d5:00:03 type veth peer name far1",
    "link set eth0 up",
    "link set eth1 up",
    "address add 10.1.0.2/24 dev eth0",
    "address add 10.2.0.2/24 dev eth1",
)


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_routes_the_best(first: int) -> None:
    """In the guest, where they have no metrics, each would take the place of the one before."""
    routes = ["route add default via 10.1.0.1 metric 100", "route add default via 10.2.0.1 metric 50"]

    def work() -> None:
        snapshot = setup(*TWO, routes[first], routes[1 - first], "route add 10.9.0.0/16 via 10.1.0.9")
        assert sorted((r.dest, r.gateway, r.device) for r in routes_to_proto(snapshot).Routes) == [
            ("", "10.2.0.1", "eth1"),
            ("10.9.0.0/16", "10.1.0.9", "eth0"),
        ]

    in_network_namespace(work)


def test_of_a_route_with_several_ways_the_first() -> None:
    def work() -> None:
        snapshot = setup(*TWO, "route add default nexthop via 10.2.0.7 nexthop via 10.1.0.7 weight 2")
        assert [(r.dest, r.gateway, r.device) for r in routes_to_proto(snapshot).Routes] == [
            ("", "10.2.0.7", "eth1")
        ]

    in_network_namespace(work)


def test_an_address_with_a_peer() -> None:
    """The guest gets the address without its peer, so it needs the route that the kernel made for that."""

    def work() -> None:
        snapshot = setup(
            *TWO[:4:2],
            "address add 10.5.0.2 peer 10.5.9.1/32 dev eth0",
            "address add fd05::2 peer fd05::9/128 dev eth0 nodad",
            "route add default via 10.5.9.1",
        )
        (eth0,) = snapshot.interfaces
        found = {(a.address, a.mask) for a in interface_to_proto(eth0).IPAddresses}
        assert found >= {("10.5.0.2", "32"), ("fd05::2", "128")}
        assert [(r.dest, r.gateway, r.scope) for r in routes_to_proto(snapshot).Routes] == [
            ("10.5.9.1/32", "", 253),
            ("fd05::9/128", "", 0),
            ("", "10.5.9.1", 0),
        ]

    in_network_namespace(work)


ETH0 = TWO[:4:2] + TWO[4:5]


@pytest.mark.parametrize(
    ("orders", "words"),
    [
        ([], []),
        (["route add default via 10.1.0.1", "route add 10.9.0.0/16 via 10.1.0.9 mtu 1300"], []),
        (["address add fd00::2/64 dev eth0 nodad", "-6 route add default via fd00::1"], []),
        (["address add 10.1.0.3/24 dev eth0", "address add 10.3.0.1/32 dev eth0"], []),
        (["rule add from 10.1.0.2 lookup 100"], ["rules"]),
        (["-6 rule del priority 32766"], ["rules"]),
        (["route add 10.9.0.0/16 via 10.1.0.1 table 100"], ["routing tables"]),
        (["route add prohibit 10.9.0.0/16"], ["kinds of routes"]),
        (["route add default via 10.1.0.1 metric 9"], ["metrics of routes"]),
        (["route add default nexthop via 10.1.0.1 nexthop via 10.1.0.9"], ["routes with several ways"]),
        (["route add default via 10.1.0.1 advmss 1200"], ["attributes of routes"]),
        (["-4 route add default via inet6 fe80::1 dev eth0"], ["attributes of routes"]),
        (["address add 10.3.0.1/24 dev eth0 label eth0:web"], ["attributes of addresses"]),
        (["address add 10.3.0.1/24 dev eth0 brd 10.3.0.9"], ["attributes of addresses"]),
        (["address add 10.3.0.1/24 dev eth0 scope link"], ["attributes of addresses"]),
        (["address add 10.3.0.1/24 dev eth0 preferred_lft 0"], ["attributes of addresses"]),
        (["address add 10.3.0.1/24 dev eth0 brd + noprefixroute"], ["attributes of addresses"]),
        (["route delete 10.1.0.0/24"], ["networks without their route"]),
        (
            ["address add fd00::2/64 dev eth0 nodad", "-6 route delete fd00::/64"],
            ["networks without their route"],
        ),
    ],
)
def test_what_the_agents_own_words_cannot_say(orders: list[str], words: list[str]) -> None:
    def work() -> None:
        assert beyond_words(setup(*ETH0, *orders), Snapshot()) == words

    in_network_namespace(work)


def test_a_neighbour_that_is_gone_cannot_be_said() -> None:
    def work() -> None:
        told = setup(*ETH0, "neighbour add 10.1.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")
        assert beyond_words(told, Snapshot()) == []
        now = setup("neighbour delete 10.1.0.9 dev eth0")
        assert beyond_words(now, told) == ["neighbours that are gone"]
        (eth0,) = told.interfaces
        assert beyond_words(now.without(eth0), told.without(eth0)) == []

    in_network_namespace(work)


def test_what_keeps_packets_away() -> None:
    def work() -> None:
        snapshot = setup(
            *ETH0,
            "route add default via 10.1.0.1",
            "route add prohibit 10.8.0.0/16",
            "-6 route add blackhole default",
            "route add throw 10.9.0.0/16",
            "rule add to 10.7.0.0/16 priority 9 unreachable",
            "route add 10.6.0.0/16 dev eth0 realm 5",
        )
        assert restrictions(snapshot) == ["route to 10.8.0.0/16", "route to everywhere", "rule 9"]
        assert nobodys(snapshot) == ["route to 10.6.0.0/16"]
        # To an agent without words for them they are not there.
        told = [route.dest for route in routes_to_proto(snapshot).Routes]
        assert told == ["", "10.6.0.0/16"]

    in_network_namespace(work)


def test_a_rule_that_drops_and_cannot_be_told_is_refused() -> None:
    def work() -> None:
        refuse_half_told(setup("rule add to 10.7.0.0/16 prohibit", "rule add lookup main realm 5"))
        with pytest.raises(NetworkNotMirrored, match=r"rule 9 of the pod, .* has conditions that no guest"):
            refuse_half_told(setup("rule add to 10.7.0.0/16 priority 9 realm 5 prohibit"))

    in_network_namespace(work)


def test_routes_over_interfaces_that_are_not_the_pods() -> None:
    def work() -> None:
        snapshot = setup(
            *TWO,
            "link set eth1 down",
            "link set eth1 up",
            "route add default nexthop via 10.1.0.1 nexthop via 10.2.0.1",
            "route add 10.9.0.0/16 via 10.2.0.1",
        )
        eth1 = next(interface for interface in snapshot.interfaces if interface.link.name == "eth1")
        left = [
            (route.destination, len(route.ways))
            for route in snapshot.without(eth1).routes
            if route.family == socket.AF_INET
        ]
        assert sorted(left) == [("", 1), ("10.1.0.0/24", 1)]

    in_network_namespace(work)
