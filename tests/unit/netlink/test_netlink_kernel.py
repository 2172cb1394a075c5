"""Questions and orders to the real kernel, in a network namespace of the test's own."""

from __future__ import annotations

import errno
import select
import socket
import subprocess
import time
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING

import pytest

from netlink import objects, shaping, tc
from netlink.objects import Address, Neighbour, Route
from netlink.rtnl import Rtnetlink, changes, drain
from tests.support.namespaces import in_network_namespace

if TYPE_CHECKING:
    from netlink.objects import Link


# <asm/socket.h>: also beyond the limits that a host has for everybody.
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def said(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def two_pairs(rtnl: Rtnetlink) -> dict[str, Link]:
    """Two virtual cables, up: a0-a1 and b0-b1."""
    for name in "ab":
        ip(f"link add {name}0 type veth peer name {name}1")
        ip(f"link set {name}0 up")
        ip(f"link set {name}1 up")
    return {link.name: link for link in rtnl.links()}


def test_links() -> None:
    def work() -> None:
        ip("link add name eth0 address 0a:58:0a:00:00:07 mtu 1400 type veth peer name eth1")
        with Rtnetlink() as rtnl:
            links = {link.name: link for link in rtnl.links()}
        assert set(links) >= {"lo", "eth0", "eth1"}
        assert links["lo"].flags & objects.IFF_LOOPBACK
        assert links["eth0"][2:4] == ("0a:58:0a:00:00:07", 1400)
        assert links["eth0"].kind == "veth"

    in_network_namespace(work)


def test_an_interface_is_set_up() -> None:
    def work() -> None:
        with Rtnetlink() as rtnl:
            eth0 = two_pairs(rtnl)["a0"].ifindex
            rtnl.set_link(eth0, up=False)
            rtnl.set_link(eth0, name="eth0", mtu=1400)
            addresses = [Address(eth0, AF_INET, "10.9.0.1", 24), Address(eth0, AF_INET6, "fd09::1", 64)]
            for address in addresses:
                rtnl.add_address(address)
                rtnl.add_address(address)
            rtnl.set_link(eth0, up=True, arp=False)
            route = Route(AF_INET, "10.77.0.0/16", "10.9.0.7", eth0, "", 0, objects.RTPROT_BOOT, 0, 0, 1300)
            rtnl.add_route(route)
            rtnl.add_route(route)
            neighbour = Neighbour(eth0, AF_INET, "10.9.0.7", "02:00:00:00:00:07", objects.NUD_PERMANENT, 0)
            rtnl.add_neighbour(neighbour)
            link = next(link for link in rtnl.links() if link.ifindex == eth0)
            assert (link.name, link.mtu) == ("eth0", 1400)
            assert link.flags & objects.IFF_UP
            assert link.flags & objects.IFF_NOARP
            assert set(addresses) <= set(rtnl.addresses())
            assert route in rtnl.routes()
            assert neighbour in rtnl.neighbours()
            assert "brd 10.9.0.255" in said("ip", "address", "show", "eth0")
            # An IPv6 address that is looked for elsewhere first could not be used for a second.
            assert "tentative" not in said("ip", "address", "show", "eth0", "to", "fd09::/64")
            rtnl.delete_route(route)
            rtnl.delete_address(addresses[0])
            assert route not in rtnl.routes()
            assert addresses[0] not in rtnl.addresses()

    in_network_namespace(work)


@pytest.mark.parametrize(
    ("order", "problem"),
    [
        (lambda rtnl: rtnl.set_link(999, up=True), "No such device"),
        (lambda rtnl: rtnl.add_address(Address(999, AF_INET, "10.0.0.1", 8)), "No such device"),
        (
            lambda rtnl: rtnl.add_route(Route(AF_INET, "", "10.1.1.1", 0, "", 0, 3, 0, 0, 0)),
            "Network is unreachable",
        ),
    ],
)
def test_refusals(order: object, problem: str) -> None:
    def work() -> None:
        with Rtnetlink() as rtnl, pytest.raises(OSError, match=problem):
            order(rtnl)  # type: ignore[operator]

    in_network_namespace(work)


def test_packets_cross() -> None:
    """What arrives at one cable's end leaves by the other cable."""

    def work() -> None:
        with Rtnetlink() as rtnl:
            links = two_pairs(rtnl)
            tc.redirect(rtnl, links["a0"].ifindex, links["b0"].ifindex)
            tc.redirect(rtnl, links["b0"].ifindex, links["a0"].ifindex)
            assert said("tc", "qdisc", "show", "dev", "a0", "ingress").startswith("qdisc ingress")
            assert "Redirect to device b0" in said("tc", "filter", "show", "dev", "a0", "ingress")
            frame = bytes(12) + b"\x88\xb5" + b"from one end to the other".ljust(46)
            with (
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as near,
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as far,
            ):
                far.bind(("b1", 0x88B5))
                far.settimeout(5)
                near.bind(("a1", 0))
                near.send(frame)
                assert far.recv(100) == frame

    in_network_namespace(work)


def test_packets_cross_with_another_address() -> None:
    def work() -> None:
        with Rtnetlink() as rtnl:
            links = two_pairs(rtnl)
            to_mac = "02:00:00:00:00:07"
            try:
                tc.redirect(rtnl, links["a0"].ifindex, links["b0"].ifindex, to_mac=to_mac)
            except OSError as err:
                assert err.errno == errno.ENOENT
                pytest.skip("this kernel has no act_skbmod")
            assert f"set dmac {to_mac}" in said("tc", "filter", "show", "dev", "a0", "ingress")
            rest = bytes(6) + b"\x88\xb5" + b"from one end to the other".ljust(46)
            with (
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as near,
                socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as far,
            ):
                far.bind(("b1", 0x88B5))
                far.settimeout(5)
                near.bind(("a1", 0))
                near.send(bytes(6) + rest)
                assert far.recv(100) == objects.mac_bytes(to_mac) + rest
            tc.end_redirect(rtnl, links["a0"].ifindex)
            assert "mirred" not in queues_and_filters("a0")

    in_network_namespace(work)


def queues_and_filters(device: str) -> str:
    """As tc(8) lists them. It names the parent of a filter or not, as it was last asked for."""
    filters = said("tc", "filter", "show", "dev", device, "ingress").replace(" parent ffff:", "")
    return said("tc", "qdisc", "show", "dev", device) + filters


@pytest.mark.parametrize("others", ["", "ingress", "clsact"])
def test_a_redirection_ends_and_leaves_what_others_did(others: str) -> None:
    def work() -> None:
        with Rtnetlink() as rtnl:
            links = two_pairs(rtnl)
            if others:
                said("tc", "qdisc", "add", "dev", "a0", others)
                accept = ["protocol", "ip", "prio", "5", "u32", "match", "u32", "0", "0", "flowid", ":1"]
                said("tc", "filter", "add", "dev", "a0", "ingress", *accept)
            before = queues_and_filters("a0")
            tc.redirect(rtnl, links["a0"].ifindex, links["b0"].ifindex)
            assert "Redirect to device b0" in queues_and_filters("a0")
            for _ in range(2):
                tc.end_redirect(rtnl, links["a0"].ifindex)
                assert queues_and_filters("a0") == before
            tc.end_redirect(rtnl, 999)

    in_network_namespace(work)


def test_changes_are_told() -> None:
    def work() -> None:
        with Rtnetlink() as rtnl, changes() as news:
            assert select.select([news], [], [], 0)[0] == []
            ip("link add d0 type veth peer name d1")
            ip("link set d1 up")
            for order in (
                "link set d0 up",
                "address add 10.0.0.1/24 dev d0",
                "route add 10.2.0.0/16 via 10.0.0.2",
                "neighbour add 10.0.0.3 lladdr 02:00:00:00:00:03 dev d0",
                "link set d0 mtu 1400",
                "link delete d0",
            ):
                drain(news)
                ip(order)
                assert select.select([news], [], [], 5)[0], order
            drain(news)
            assert select.select([news], [], [], 0)[0] == []
            assert rtnl.links()

    in_network_namespace(work)


def test_more_changes_than_fit_are_still_told() -> None:
    def work() -> None:
        with changes() as news:
            batch = "".join(f"address add 10.{i // 250}.{i % 250}.1/32 dev lo\n" for i in range(4000))
            subprocess.run(["ip", "-batch", "-"], input=batch, text=True, check=True)
            drain(news)
            assert select.select([news], [], [], 0)[0] == []

    in_network_namespace(work)


def test_a_limit_holds() -> None:
    """A burst of frames takes as long as the rate says; without a limit it is gone at once."""
    frames, frame = 200, bytes(12) + b"\x88\xb5" + bytes(1386)
    bits_per_s = 2_000_000

    def seconds_for_all() -> float:
        with (
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as near,
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as far,
        ):
            far.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
            near.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20)
            far.bind(("a1", 0x88B5))
            far.settimeout(60)
            began = time.monotonic()
            for _ in range(frames):
                near.sendto(frame, ("a0", 0))
            for _ in range(frames):
                assert len(far.recv(2000)) == len(frame)
            return time.monotonic() - began

    def work() -> None:
        with Rtnetlink() as rtnl:
            links = two_pairs(rtnl)
            unlimited_s = seconds_for_all()
            shaping.limit(rtnl, links["a0"].ifindex, bits_per_s)
            limited_s = seconds_for_all()
            burst_bytes = 65536
            assert limited_s > 0.8 * (frames * len(frame) - burst_bytes) * 8 / bits_per_s
            assert limited_s > 3 * unlimited_s
            shaping.end_limit(rtnl, links["a0"].ifindex)
            assert seconds_for_all() < limited_s

    in_network_namespace(work)


@pytest.mark.parametrize(
    ("bits_per_s", "shown"),
    [(1, "8bit"), (9_999_999, "9999Kbit"), (10_000_000, "10Mbit"), (100_000_000_000, "100Gbit")],
)
def test_limits_come_and_go(bits_per_s: int, shown: str) -> None:
    def work() -> None:
        with Rtnetlink() as rtnl:
            links = two_pairs(rtnl)
            a0, b0 = links["a0"].ifindex, links["b0"].ifindex
            shaping.limit(rtnl, a0, bits_per_s)
            assert f" rate {shown} ceil {shown} " in said("tc", "class", "show", "dev", "a0")
            assert "default 0x1 " in said("tc", "qdisc", "show", "dev", "a0")
            with pytest.raises(OSError, match="File exists"):
                shaping.limit(rtnl, a0, bits_per_s)
            said("tc", "qdisc", "add", "dev", "b0", "root", "pfifo")
            with pytest.raises(OSError, match="File exists"):
                shaping.limit(rtnl, b0, bits_per_s)
            for ifindex in (a0, a0, b0, 999):
                shaping.end_limit(rtnl, ifindex)
            assert "htb" not in said("tc", "qdisc", "show")
            assert "pfifo" in said("tc", "qdisc", "show", "dev", "b0")

    in_network_namespace(work)


def test_interfaces_are_made_and_removed() -> None:
    def work() -> None:
        with Rtnetlink() as rtnl:
            a0 = two_pairs(rtnl)["a0"]
            rtnl.add_link("detour", "ifb")
            rtnl.add_macvtap("tap0", a0.ifindex)
            links = {link.name: link for link in rtnl.links()}
            assert links["detour"].kind == "ifb"
            assert (links["tap0"].kind, links["tap0"].mac) == ("macvtap", a0.mac)
            assert "passthru" in said("ip", "-d", "link", "show", "tap0")
            with pytest.raises(OSError, match="File exists"):
                rtnl.add_link("detour", "ifb")
            for name in ("detour", "tap0"):
                rtnl.delete_link(links[name].ifindex)
            assert not {"detour", "tap0"} & {link.name for link in rtnl.links()}
            with pytest.raises(OSError, match="No such device"):
                rtnl.delete_link(links["tap0"].ifindex)

    in_network_namespace(work)
