"""What of a network namespace is the pod's, and the agent's words for it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any, cast

import pytest

from netlink.objects import IFF_NOARP, IFF_UP, Link
from netlink.rtnl import Rtnetlink
from shim.errors import NetworkNotMirrored
from shim.interfaces import NO_MAC, interface_to_proto, neighbours_to_proto, routes_to_proto, scan
from tests.support.namespaces import in_network_namespace

if TYPE_CHECKING:
    from shim.interfaces import Snapshot


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

    def nothing(self) -> list[Any]:
        return []

    addresses = routes = neighbours = nothing


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
