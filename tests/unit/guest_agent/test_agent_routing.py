"""The pod's addresses, routes, rules and neighbours in the guest: what ip(8) shows there is what it shows on the host.

Both sides are real network namespaces; what crosses between them is the message.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import agent_pb2, kata_py_agent_pb2
from guest_agent import network, routing
from guest_agent.errors import InvalidRequest, NotFound
from netlink.rtnl import Rtnetlink
from shim.interfaces import interface_to_proto, scan
from shim.routing import mirror_to_proto, routes_to_proto
from tests.support.namespaces import in_network_namespace, until_addresses_serve

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = (
    "link set lo up",
    "link add eth0 address 0a:58:0a:d5:00:02 type veth peer name far0",
    "link add net1 address 0a:58:0a:d5:00:03 type veth peer name far1",
    *(f"link set {name} addrgenmode none" for name in ("eth0", "net1", "far0", "far1")),
    *(f"link set {name} up" for name in ("far0", "far1")),
)
POD = (
    *("link set eth0 up", "link set net1 up"),
    "address add 10.1.0.2/24 brd + dev eth0",
    "address add 10.2.0.2/24 brd + dev net1",
    "address add fd01::2/64 dev eth0 nodad",
    "route add default via 10.1.0.1",
)
# As the plugin sbr leaves it.
SBR = (
    "rule add from 10.2.0.2 lookup 100",
    "route add 10.2.0.0/24 dev net1 src 10.2.0.2 table 100",
    "route add default via 10.2.0.1 dev net1 table 100",
    "route delete 10.2.0.0/24 dev net1",
)
# Gateways that nothing leads to any more: of the second, the plugin leaves a default route of the main table behind.
CUT_OFF = (
    "-6 route add default nexthop via fd01::1 dev eth0 nexthop via fd07::1 dev net1 onlink",
    "address add fd07::2/64 dev net1 nodad",
    "-6 route change default nexthop via fd01::1 dev eth0 nexthop via fd07::1 dev net1",
    "-6 route delete fd07::/64 dev net1",
    "route add 10.55.0.0/16 via 10.2.0.77",
    "route delete 10.2.0.0/24 dev net1",
    "route add 10.56.0.0/16 nexthop via 10.1.0.5 nexthop via 10.2.0.77 dev net1 onlink",
)
EVERYTHING = (
    *SBR,
    "-6 rule add from fd01::2 lookup 100",
    "-6 route add default via fd01::1 table 100",
    "-6 route add prohibit fd09::/48",
    "route add blackhole 10.9.0.0/16",
    "route add unreachable 10.8.0.0/16 metric 9",
    "route add default via 10.1.0.9 metric 100 advmss 1200",
    "route add 10.7.0.0/16 nexthop via 10.1.0.3 weight 2 nexthop via 10.1.0.4",
    "route add 10.6.0.0/16 via 10.99.0.1 dev eth0 onlink",
    "route add local 10.5.0.0/16 dev lo table 7",
    "rule add priority 9 not fwmark 7 lookup 7",
    "rule add priority 20 ipproto tcp dport 25 prohibit",
    "rule delete priority 32767",
    "address add 10.3.0.2/32 peer 10.3.0.1 dev eth0",
    "address add 10.4.0.2/24 dev eth0 label eth0:web",
    "address add fd02::2/64 dev eth0 nodad preferred_lft 0",
    "neighbour add 10.1.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent",
    "-6 neighbour add fd01::1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent router",
)


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


def shown() -> str:
    """All that ip(8) shows, in an order that does not depend on who came first."""
    until_addresses_serve()
    found = [ip(f"-{family} rule") for family in "46"]
    for family in "46":
        routes = ip(f"-d -{family} route show table all").replace("\n\t", " ")
        found += sorted(line for line in routes.splitlines() if "fe80" not in line and "ff00" not in line)
    found += [ip(f"-d address show dev {name}").partition("link/ether")[2] for name in ("eth0", "net1")]
    found += sorted(ip("neighbour").splitlines())
    return "\n".join(found)


def on_the_host(folder: Path, *stages: tuple[str, ...]) -> None:
    """Do the orders of each stage, and keep what the guest is told after it, and what is to be seen there."""

    def work() -> None:
        for order in PLAIN:
            ip(order)
        for number, orders in enumerate(stages):
            for order in orders:
                ip(order)
            with Rtnetlink() as rtnl:
                snapshot = scan(rtnl)
            pods = snapshot._replace(
                interfaces=tuple(each for each in snapshot.interfaces if "far" not in each.link.name)
            )
            plain = agent_pb2.Interfaces(Interfaces=map(interface_to_proto, pods.interfaces))
            (folder / f"interfaces{number}").write_bytes(plain.SerializeToString())
            (folder / f"routes{number}").write_bytes(routes_to_proto(pods).SerializeToString())
            (folder / f"mirror{number}").write_bytes(mirror_to_proto(pods).SerializeToString())
            (folder / f"seen{number}").write_text(shown())

    in_network_namespace(work)


def in_the_guest(folder: Path, number: int, mirror: routing.NetworkMirror) -> None:
    """What the agent does when the shim tells it of a stage."""
    plain = agent_pb2.Interfaces.FromString((folder / f"interfaces{number}").read_bytes())
    for interface in plain.Interfaces:
        network.update_interface(interface)
    request = (folder / f"mirror{number}").read_bytes()
    mirror.update(kata_py_agent_pb2.MirrorNetworkRequest.FromString(request))


@pytest.mark.parametrize(
    "more", [(), SBR, CUT_OFF, EVERYTHING], ids=["plain", "sbr", "cut off", "everything"]
)
def test_the_guest_has_what_the_host_has(tmp_path: Path, more: tuple[str, ...]) -> None:
    on_the_host(tmp_path, (*POD, *more))

    def work() -> None:
        for order in PLAIN:
            ip(order)
        mirror = routing.NetworkMirror()
        for _ in range(2):
            in_the_guest(tmp_path, 0, mirror)
            assert shown() == (tmp_path / "seen0").read_text()

    in_network_namespace(work)


def test_everything_changes_and_goes(tmp_path: Path) -> None:
    on_the_host(
        tmp_path,
        POD,
        EVERYTHING,
        (
            "route replace default via 10.2.0.9 dev net1 table 100",
            "rule add from 10.2.0.2 lookup 101 priority 5",
            "route replace 10.7.0.0/16 nexthop via 10.1.0.3 nexthop via 10.1.0.5 weight 9",
            "address change fd02::2/64 dev eth0 nodad preferred_lft forever",
            "neighbour replace 10.1.0.1 lladdr 02:00:00:00:00:22 dev eth0 nud permanent",
            "route delete blackhole 10.9.0.0/16",
            "route add prohibit 10.9.0.0/16",
        ),
        (
            "address flush dev net1",
            "-6 route flush table 100",
            "rule flush",
            "rule add priority 32766 lookup main",
            "rule add priority 32767 lookup default",
            "-6 rule del from fd01::2",
            *(
                f"route delete {kind} 10.{number}.0.0/16"
                for kind, number in (("prohibit", 9), ("unreachable", 8))
            ),
            "route flush table 7",
            "neighbour delete 10.1.0.1 dev eth0",
        ),
    )

    def work() -> None:
        for order in PLAIN:
            ip(order)
        plain = agent_pb2.Interfaces.FromString((tmp_path / "interfaces0").read_bytes())
        for interface in plain.Interfaces:
            network.update_interface(interface)
        # The protocol's own messages come first, and what they made is taken over.
        network.update_routes(agent_pb2.Routes.FromString((tmp_path / "routes0").read_bytes()).Routes)
        assert shown() == (tmp_path / "seen0").read_text()
        mirror = routing.NetworkMirror()
        for number in range(4):
            in_the_guest(tmp_path, number, mirror)
            assert shown() == (tmp_path / f"seen{number}").read_text(), number

    in_network_namespace(work)


def test_what_containers_have_made_stays(tmp_path: Path) -> None:
    on_the_host(tmp_path, (*POD, *SBR), ("rule delete from 10.2.0.2", "route flush table 100"))
    theirs = (
        "rule add fwmark 0x539 lookup 133",
        "route add local 0.0.0.0/0 dev lo table 133",
        "route add 10.77.0.0/16 via 10.1.0.7",
        "neighbour add 10.1.0.7 lladdr 02:00:00:00:00:07 dev eth0 nud permanent",
    )

    def work() -> None:
        for order in PLAIN:
            ip(order)
        mirror = routing.NetworkMirror()
        in_the_guest(tmp_path, 0, mirror)
        before = shown()
        for order in theirs:
            ip(order)
        for number, rule in enumerate(("from 10.2.0.2 lookup 100", "")):
            in_the_guest(tmp_path, number, mirror)
            assert rule in ip("rule")
            assert "fwmark 0x539 lookup 133" in ip("rule")
            assert "local default dev lo" in ip("route show table 133")
            assert "10.77.0.0/16 via 10.1.0.7" in ip("route")
            assert "02:00:00:00:00:07" in ip("neighbour")
        assert before != shown()
        assert "lookup 100" not in ip("rule")

    in_network_namespace(work)


def test_what_was_half_made_is_not_forgotten(tmp_path: Path) -> None:
    on_the_host(tmp_path, (*POD, *SBR), ("rule delete from 10.2.0.2", "route flush table 100"))

    def work() -> None:
        for order in PLAIN:
            ip(order)
        mirror = routing.NetworkMirror()
        request = kata_py_agent_pb2.MirrorNetworkRequest.FromString((tmp_path / "mirror0").read_bytes())
        for interface in agent_pb2.Interfaces.FromString((tmp_path / "interfaces0").read_bytes()).Interfaces:
            network.update_interface(interface)
        # A rule may lead to a rule behind it, and to no other.
        request.rules.add(priority=50000, action=2, goto=7)
        with pytest.raises(OSError, match="rule 50000: Invalid argument"):
            mirror.update(request)
        assert "lookup 100" in ip("rule")
        remembered = mirror._made
        for _ in range(3):
            with pytest.raises(OSError, match="rule 50000: Invalid argument"):
                mirror.update(request)
        assert mirror._made == remembered
        in_the_guest(tmp_path, 1, mirror)
        assert shown() == (tmp_path / "seen1").read_text()

    in_network_namespace(work)


ETH0 = {"device": "eth0"}
WAY = {"device": "eth0", "weight": 1}
ROUTE: dict[str, Any] = {"destination": "10.0.0.0/8", "table": 254, "kind": 1, "ways": [WAY]}
RULE: dict[str, Any] = {"priority": 9, "action": 1, "table": 100}
NEIGHBOUR: dict[str, Any] = {
    "device": "eth0",
    "address": "10.1.0.9",
    "mac": "02:00:00:00:00:01",
    "state": 128,
}


@pytest.mark.parametrize(
    ("fields", "kind", "problem"),
    [
        ({"interfaces": [{"device": "eth9"}]}, NotFound, "there is no interface 'eth9'"),
        (
            {"interfaces": [{**ETH0, "addresses": [{"address": "ten"}]}]},
            InvalidRequest,
            "'ten' is no address",
        ),
        (
            {"interfaces": [{**ETH0, "addresses": [{"address": "10.0.0.1", "prefix": 33}]}]},
            InvalidRequest,
            "33 is no length",
        ),
        (
            {"interfaces": [{**ETH0, "addresses": [{"address": "10.0.0.1", "peer": "fd00::1"}]}]},
            InvalidRequest,
            "'fd00::1' is no address of its family",
        ),
        (
            {"interfaces": [{**ETH0, "addresses": [{"address": "10.0.0.1", "label": "x" * 16}]}]},
            InvalidRequest,
            "1 to 15 bytes",
        ),
        (
            {"interfaces": [{**ETH0, "addresses": [{"address": "10.0.0.1", "scope": 256}]}]},
            InvalidRequest,
            "scope: want at most 255, got 256",
        ),
        ({"routes": [{**ROUTE, "destination": "10.0.0.0/33"}]}, InvalidRequest, "'33' is no length"),
        ({"routes": [{**ROUTE, "destination": "10.0.0.0"}]}, InvalidRequest, "'' is no length"),
        ({"routes": [{**ROUTE, "v6": True}]}, InvalidRequest, "'10.0.0.0' is no address of its family"),
        ({"routes": [{**ROUTE, "kind": 5}]}, InvalidRequest, "5 is no kind of routes"),
        ({"routes": [{**ROUTE, "kind": 6}]}, InvalidRequest, "none for what does not"),
        ({"routes": [{**ROUTE, "ways": []}]}, InvalidRequest, "want a way"),
        ({"routes": [{**ROUTE, "ways": [WAY] * 257}]}, InvalidRequest, "257 .* are more than a guest takes"),
        ({"routes": [{**ROUTE, "ways": [{**WAY, "weight": 257}]}]}, InvalidRequest, "1 to 256, not 257"),
        ({"routes": [{**ROUTE, "ways": [{**WAY, "flags": 5}]}]}, InvalidRequest, "0x5 are no flags"),
        ({"routes": [{**ROUTE, "ways": [{**WAY, "gateway": "fd00:::1"}]}]}, InvalidRequest, "no address"),
        (
            {"routes": [{**ROUTE, "v6": True, "destination": "", "ways": [{**WAY, "gateway": "10.1.0.1"}]}]},
            InvalidRequest,
            "'10.1.0.1' is no address",
        ),
        ({"routes": [{**ROUTE, "ways": [{**WAY, "device": "eth9"}]}]}, NotFound, "'eth9'"),
        ({"routes": [{**ROUTE, "table": 0}]}, InvalidRequest, "want a table"),
        ({"routes": [{**ROUTE, "metrics": {18: 1}}]}, InvalidRequest, "18 is no metric"),
        ({"routes": [{**ROUTE, "protocol": 256}]}, InvalidRequest, "protocol: want at most 255"),
        (
            {"routes": [ROUTE] * (routing.MAX_ROUTES + 1)},
            InvalidRequest,
            "16385 routes are more than a guest",
        ),
        (
            {"rules": [RULE] * (routing.MAX_RULES + 1)},
            InvalidRequest,
            "4097 rules are more than a guest takes",
        ),
        ({"rules": [{**RULE, "action": 4}]}, InvalidRequest, "4 is no action"),
        ({"rules": [{**RULE, "incoming": "x" * 16}]}, InvalidRequest, "1 to 15 bytes"),
        ({"rules": [{**RULE, "source": "fd00::/64"}]}, InvalidRequest, "no address of its family"),
        (
            {"rules": [{**RULE, "source_ports": {"first": 9, "last": 8}}]},
            InvalidRequest,
            "9 to 8 is no range",
        ),
        ({"rules": [{**RULE, "source_ports": {"first": 9, "last": 65536}}]}, InvalidRequest, "no range"),
        ({"rules": [{**RULE, "tos": 256}]}, InvalidRequest, "tos: want at most 255"),
        ({"neighbours": [{**NEIGHBOUR, "mac": "02:00"}]}, InvalidRequest, "no MAC address"),
        ({"neighbours": [{**NEIGHBOUR, "address": ""}]}, InvalidRequest, "'' is no address"),
        ({"neighbours": [{**NEIGHBOUR, "flags": 256}]}, InvalidRequest, "flags: want at most 255"),
    ],
)
def test_refusals(fields: dict[str, Any], kind: type[Exception], problem: str) -> None:
    """Nothing has been changed when a request is refused."""

    def work() -> None:
        for order in (*PLAIN, *POD):
            ip(order)
        before = shown()
        with pytest.raises(kind, match=problem):
            routing.NetworkMirror().update(kata_py_agent_pb2.MirrorNetworkRequest(**fields))
        assert shown() == before

    in_network_namespace(work)
