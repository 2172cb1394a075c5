"""What of a network namespace is the pod's, and the agent's words for it."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from netlink.rtnl import Rtnetlink
from shim.errors import NetworkNotMirrored
from shim.interfaces import interface_to_proto, neighbours_to_proto, routes_to_proto, scan
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
