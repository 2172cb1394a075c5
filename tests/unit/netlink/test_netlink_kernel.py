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

from netlink import objects, rules, shaping, tc
from netlink.objects import Address, Neighbour
from netlink.routes import RTAX_MTU, Route, Way
from netlink.rtnl import Rtnetlink, changes, drain
from tests.support.namespaces import in_network_namespace, until_addresses_serve

if TYPE_CHECKING:
    from netlink.objects import Link


# <asm/socket.h>: also beyond the limits that a host has for everybody.
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


def said(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def two_pairs(rtnl: Rtnetlink) -> dict[str, Link]:
    """Two virtual cables, up: a0-a1 and b0-b1. Link-local addresses would come in the middle of a test."""
    for name in "ab":
        ip(f"link add {name}0 type veth peer name {name}1")
        ip(f"link set {name}0 addrgenmode none")
        ip(f"link set {name}1 addrgenmode none")
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
            addresses = [
                Address(eth0, AF_INET, "10.9.0.1", 24, broadcast="10.9.0.255", label="eth0"),
                Address(eth0, AF_INET6, "fd09::1", 64),
            ]
            for address in addresses:
                rtnl.add_address(address)
                rtnl.add_address(address)
            rtnl.set_link(eth0, up=True, arp=False)
            route = Route(AF_INET, "10.77.0.0/16", (Way(eth0, "10.9.0.7"),), metrics=((RTAX_MTU, 1300),))
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
            lambda rtnl: rtnl.add_route(Route(AF_INET, "", (Way(0, "10.1.1.1"),))),
            "Network is unreachable",
        ),
    ],
)
def test_refusals(order: object, problem: str) -> None:
    def work() -> None:
        with Rtnetlink() as rtnl, pytest.raises(OSError, match=problem):
            order(rtnl)  # type: ignore[operator]

    in_network_namespace(work)


ROUTES = [
    "default via 10.1.0.1",
    "default via 10.1.0.1 metric 50",
    "10.9.0.0/16 via 10.1.0.1 dev a0 src 10.1.0.2 mtu lock 1300 advmss 1200 initcwnd 12 window 9000",
    "10.9.0.0/16 via 10.7.7.7 dev a0 onlink",
    "10.9.0.0/16 dev a0 scope link proto static table 100",
    "10.9.0.0/16 dev a0 tos 0x10 table 70000",
    "10.9.0.0/16 via inet6 fd01::1 dev a0",
    "10.9.0.0/16 nexthop via 10.1.0.1 weight 3 nexthop via 10.2.0.1 dev b0 nexthop dev b0 weight 256",
    "blackhole 10.9.0.0/16",
    "unreachable 10.9.0.0/16 table 100 metric 5",
    "prohibit 10.9.0.0/16",
    "throw 10.9.0.0/16 table 100",
    "local 10.9.0.0/16 dev lo table 100",
    "-6 default via fd01::1",
    "-6 default via fd01::1 metric 50 pref high",
    "-6 fd09::/48 via fd01::1 dev a0 src fd01::2 mtu 1300 hoplimit 9",
    "-6 fd09::/48 via fe80::99 dev a0 onlink table 100",
    "-6 fd09::/48 from fd01::/64 via fd01::1",
    "-6 fd09::/48 nexthop via fd01::1 dev a0 weight 2 nexthop via fd02::1 dev b0",
    "-6 blackhole fd09::/48",
    "-6 unreachable fd09::/48 metric 7 table 100",
    "-6 prohibit fd09::/48",
]


@pytest.mark.parametrize("words", ROUTES)
def test_a_route_of_somebodys_is_read_and_made_again(words: str) -> None:
    """With every attribute: what ip(8) shows is the same as of the route that it has made itself."""

    def work() -> None:
        ip("link set lo up")
        with Rtnetlink() as rtnl:
            two_pairs(rtnl)
            for number, name in enumerate(("a0", "b0"), start=1):
                ip(f"address add 10.{number}.0.2/24 dev {name}")
                ip(f"address add fd0{number}::2/64 dev {name} nodad")
            until_addresses_serve()
            before = set(rtnl.routes())
            family, order = ("-6", words[3:]) if words.startswith("-6 ") else ("-4", words)
            ip(f"{family} route add {order}")
            shown = said("ip", "-d", family, "route", "show", "table", "all")
            (route,) = set(rtnl.routes()) - before
            assert route.rest == ()
            rtnl.delete_route(route)
            assert set(rtnl.routes()) == before
            rtnl.append_route(route)
            assert set(rtnl.routes()) - before == {route}
            assert said("ip", "-d", family, "route", "show", "table", "all") == shown

    in_network_namespace(work)


RULES = [
    "from 10.1.0.2 lookup 100",
    "from 10.1.0.0/24 to 10.2.0.0/16 iif lo oif a0 priority 7 lookup 70000 protocol static",
    "not fwmark 0xca6c lookup 51820",
    "fwmark 0x10/0xf0 tos 0x10 lookup 100",
    "lookup main suppress_prefixlength 0 suppress_ifgroup 3 priority 9",
    "ipproto tcp sport 80 dport 1000-2000 lookup 100",
    "uidrange 1000-1999 blackhole",
    "from 10.3.0.0/16 unreachable",
    "from 10.4.0.0/16 prohibit",
    "priority 10 goto 32766",
    "priority 11 nop",
    "-6 from fd01::2 lookup 100",
    "-6 to fd02::/48 iif gone0 prohibit",
    "-6 not fwmark 0xca6c lookup 51820 priority 0",
]


@pytest.mark.parametrize("words", RULES)
def test_a_rule_of_somebodys_is_read_and_made_again(words: str) -> None:
    def work() -> None:
        with Rtnetlink() as rtnl:
            assert rules.rules(rtnl) == list(rules.DEFAULT)
            family, order = ("-6", words[3:]) if words.startswith("-6 ") else ("-4", words)
            ip(f"{family} rule add {order}")
            shown = said("ip", "-d", family, "rule")
            (rule,) = set(rules.rules(rtnl)) - set(rules.DEFAULT)
            assert rule.rest == ()
            rules.delete(rtnl, rule)
            assert rules.rules(rtnl) == list(rules.DEFAULT)
            rules.add(rtnl, rule)
            assert set(rules.rules(rtnl)) - set(rules.DEFAULT) == {rule}
            assert said("ip", "-d", family, "rule") == shown
            with pytest.raises(OSError, match="File exists"):
                rules.add(rtnl, rule)

    in_network_namespace(work)


def test_the_kernels_own_rules_come_and_go() -> None:
    def work() -> None:
        with Rtnetlink() as rtnl:
            shown = said("ip", "rule"), said("ip", "-6", "rule")
            for rule in rules.DEFAULT:
                rules.delete(rtnl, rule)
            assert rules.rules(rtnl) == []
            for rule in rules.DEFAULT:
                rules.add(rtnl, rule)
            assert (said("ip", "rule"), said("ip", "-6", "rule")) == shown

    in_network_namespace(work)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("route add 10.9.0.0/16 dev lo realm 7", "realm"),
        ("route add 10.9.0.0/16 dev lo congctl reno", "congestion control"),
    ],
)
def test_what_is_not_told_is_known(words: str, told: str) -> None:
    def work() -> None:
        ip("link set lo up")
        ip(words)
        with Rtnetlink() as rtnl:
            (route,) = [route for route in rtnl.routes() if route.destination == "10.9.0.0/16"]
        assert route.rest, told

    in_network_namespace(work)


ADDRESSES = [
    "10.1.0.2/24 brd +",
    "10.1.0.2/24 brd 10.1.0.99",
    "10.1.0.2/24 label a0:web",
    "10.1.0.2/24 scope link",
    "10.1.0.2/24 scope 77",
    "10.1.0.2/24 noprefixroute",
    "10.1.0.2/24 metric 50",
    "10.1.0.2/24 preferred_lft 0 valid_lft forever",
    "10.1.0.2 peer 10.5.0.1/32",
    "fd01::2/64 nodad",
    "fd01::2/64 nodad noprefixroute home",
    "fd01::2/64 nodad metric 50",
    "fd01::2/64 nodad preferred_lft 0 valid_lft forever",
    "fd01::2 peer fd05::1/128 nodad",
]


@pytest.mark.parametrize("words", ADDRESSES)
def test_an_address_of_somebodys_is_read_and_made_again(words: str) -> None:
    def shown() -> str:
        """With the routes that the kernel has made for it."""
        routes = said("ip", "route", "show", "table", "all") + said("ip", "-6", "route", "show", "dev", "a0")
        text = said("ip", "-d", "address", "show", "dev", "a0")
        return f"{text.replace('forever', '')}{routes}"

    def work() -> None:
        with Rtnetlink() as rtnl:
            two_pairs(rtnl)
            ip(f"address add {words} dev a0")
            until_addresses_serve()
            text = shown()
            (address,) = rtnl.addresses()
            rtnl.delete_address(address)
            assert address.key not in [there.key for there in rtnl.addresses()]
            rtnl.add_address(address)
            assert address in rtnl.addresses()
            until_addresses_serve()
            assert shown() == text
            assert "tentative" not in text.partition(f"inet6 {address.address}")[2]

    in_network_namespace(work)


def test_an_address_that_its_user_lets_die() -> None:
    """Lifetimes are the kernel's to count: it says that an address is used for nothing new, and that it is gone."""

    def work() -> None:
        with Rtnetlink() as rtnl, changes() as news:
            a0 = two_pairs(rtnl)["a0"].ifindex
            ip("address add fd01::2/64 dev a0 nodad valid_lft 3 preferred_lft 1")
            kept = Address(a0, AF_INET6, "fd01::2", 64)
            assert kept in rtnl.addresses()
            for seen in (kept._replace(flags=objects.IFA_F_DEPRECATED), None):
                while next((a for a in rtnl.addresses() if a.address == "fd01::2"), None) != seen:
                    drain(news)
                    assert select.select([news], [], [], 20)[0]

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
                "rule add from 10.0.0.1 lookup 100",
                "-6 rule add from fd00::1 lookup 100",
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


def test_an_interface_moves_to_another_network() -> None:
    """What only was for a time, or is the interface's own, does not count as its addresses."""

    def work() -> None:
        with Rtnetlink() as rtnl:
            a0 = two_pairs(rtnl)["a0"].ifindex
            ip("addr add 10.9.0.1/24 dev a0")
            ip("addr add fd09::1/64 dev a0 nodad")
            ip("addr add fd09::2/64 dev a0 nodad valid_lft 500 preferred_lft 500")
            lasting = [address.address for address in rtnl.lasting_addresses() if address.ifindex == a0]
            assert lasting == ["10.9.0.1", "fd09::1"]
            other = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=-1, stdout=-1)
            assert other.stdout
            other.stdout.readline()
            try:
                with open(f"/proc/{other.pid}/ns/net") as namespace:
                    rtnl.move_link(a0, "eth0", namespace.fileno())
                    assert "a0" not in {link.name for link in rtnl.links()}
                    with pytest.raises(OSError, match="No such device"):
                        rtnl.move_link(a0, "eth0", namespace.fileno())
                shown = said("nsenter", f"--net=/proc/{other.pid}/ns/net", "ip", "-o", "link")
                assert "eth0@" in shown
            finally:
                other.communicate()

    in_network_namespace(work)
