"""The host's description of the network, carried out by the real kernel in a namespace of the test's own."""

from __future__ import annotations

import asyncio
import subprocess
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import agent_pb2, types_pb2
from guest_agent import network
from guest_agent.cmdline import Settings
from guest_agent.errors import InvalidRequest, NotFound
from guest_agent.log import Log
from guest_agent.service import AgentService
from guest_agent.uevent import Uevents
from tests.support.namespaces import in_network_namespace

if TYPE_CHECKING:
    from collections.abc import Callable

MAC = "0a:58:0a:d5:00:{:02x}"


def ip(words: str) -> str:
    done = subprocess.run(["ip", "-br", *words.split()], check=True, capture_output=True, text=True)
    return " ".join(done.stdout.split())


def hardware(*names: str) -> None:
    """Interfaces with MAC addresses that end with 0, 1, ..."""
    for number, name in enumerate(names):
        ip(f"link add {name} address {MAC.format(number)} type veth peer name peer{number}")
        ip(f"link set peer{number} up")


def interface(number: int, name: str, *addresses: str, **fields: Any) -> types_pb2.Interface:
    return types_pb2.Interface(
        name=name,
        hwAddr=MAC.format(number),
        IPAddresses=[
            types_pb2.IPAddress(
                family=types_pb2.v6 if ":" in address else types_pb2.v4,
                address=address.partition("/")[0],
                mask=address.partition("/")[2],
            )
            for address in addresses
        ],
        **fields,
    )


def test_an_interface() -> None:
    def work() -> None:
        hardware("enp0s3")
        given = interface(0, "eth0", "10.1.0.2/24", "fd00::2/64", mtu=1400)
        answer = network.update_interface(given)
        assert (answer.name, answer.mtu, answer.hwAddr, answer.type) == ("eth0", 1400, MAC.format(0), "veth")
        assert [(a.address, a.mask, a.family) for a in answer.IPAddresses][:2] == [
            ("10.1.0.2", "24", types_pb2.v4),
            ("fd00::2", "64", types_pb2.v6),
        ]
        assert "UP" in ip("link show eth0")
        assert {entry.name for entry in network.interfaces().Interfaces} == {"lo", "eth0", "peer0"}

    in_network_namespace(work)


def test_an_interface_once_more_with_other_addresses() -> None:
    def work() -> None:
        hardware("enp0s3")
        network.update_interface(interface(0, "eth0", "10.1.0.2/24", "10.1.0.3/24"))
        own = [word for word in ip("-6 address show eth0").split() if word.startswith("fe80")]
        network.update_interface(interface(0, "eth0", "10.1.0.3/24", "10.2.0.2/16", raw_flags=0x80))
        shown = ip("address show eth0")
        assert [word for word in shown.split() if "." in word] == ["10.1.0.3/24", "10.2.0.2/16"]
        assert own
        assert own[0] in shown
        assert "NOARP" in ip("link show eth0")
        network.update_interface(interface(0, "eth0", "10.1.0.3/24"))
        assert "NOARP" not in ip("link show eth0")

    in_network_namespace(work)


def test_names_change_places() -> None:
    def work() -> None:
        hardware("eth0", "eth1")
        network.update_interface(interface(0, "eth1", "10.1.0.2/24"))
        network.update_interface(interface(1, "eth0", "10.2.0.2/24"))
        assert MAC.format(0) in ip("link show eth1")
        assert MAC.format(1) in ip("link show eth0")
        assert "10.2.0.2/24" in ip("address show eth0")

    in_network_namespace(work)


def route(**fields: Any) -> types_pb2.Route:
    return types_pb2.Route(**fields)


def test_routes_in_any_order() -> None:
    def work() -> None:
        hardware("enp0s3")
        network.update_interface(interface(0, "eth0", "10.1.0.2/32", "fd00::2/64"))
        answer = network.update_routes(
            [
                # Over a gateway that only the second makes reachable.
                route(device="eth0", gateway="169.254.1.1"),
                route(device="eth0", dest="169.254.1.1/32", scope=253),
                route(device="eth0", dest="10.7.0.0/16", gateway="10.9.9.9", flags=4, mtu=1300),
                route(device="eth0", dest="fd07::/48", gateway="fd00::1", family=types_pb2.v6),
            ]
        )
        told = {(entry.dest, entry.gateway, entry.device) for entry in answer.Routes}
        assert {("", "169.254.1.1", "eth0"), ("169.254.1.1/32", "", "eth0")} <= told
        assert ("fd07::/48", "fd00::1", "eth0") in told
        assert "via 10.9.9.9 dev eth0 onlink mtu 1300" in ip("route show 10.7.0.0/16")
        network.update_routes([route(device="eth0", dest="10.8.0.0/16", scope=253)])
        assert ip("-4 route") == "10.8.0.0/16 dev eth0 scope link"

    in_network_namespace(work)


def test_neighbours() -> None:
    def work() -> None:
        hardware("enp0s3")
        network.update_interface(interface(0, "eth0", "10.1.0.2/24"))
        for mac in ("02:00:00:00:00:01", "02:00:00:00:00:02"):
            network.add_neighbours(
                [
                    types_pb2.ARPNeighbor(
                        toIPAddress=types_pb2.IPAddress(address="10.1.0.9"), device="eth0", lladdr=mac
                    )
                ]
            )
        assert ip("neighbour show 10.1.0.9") == "10.1.0.9 eth0 02:00:00:00:00:02"

    in_network_namespace(work)


@pytest.mark.parametrize(
    ("order", "kind", "problem"),
    [
        (lambda: network.update_interface(interface(7, "eth0")), NotFound, MAC.format(7)),
        (lambda: network.update_interface(interface(0, "")), InvalidRequest, "no name"),
        (lambda: network.update_interface(interface(0, "../etc")), InvalidRequest, "no name"),
        (lambda: network.update_interface(interface(0, "x" * 16)), InvalidRequest, "1 to 15 bytes"),
        (lambda: network.update_interface(interface(0, "eth0", "10.0.0.1/33")), InvalidRequest, "'33' is no"),
        (lambda: network.update_interface(interface(0, "eth0", "10.0.0.1/-1")), InvalidRequest, "'-1' is no"),
        (
            lambda: network.update_interface(interface(0, "eth0", "10.0.0/8")),
            InvalidRequest,
            "address 10.0.0/8",
        ),
        (lambda: network.update_routes([route(device="eth9", dest="10.0.0.0/8")]), NotFound, "'eth9'"),
        (lambda: network.update_routes([route(device="old", dest="ten/8")]), OSError, "route to ten/8"),
        (
            lambda: network.update_routes([route(device="old", dest="10.0.0.0/x")]),
            InvalidRequest,
            "10.0.0.0/x",
        ),
        (
            lambda: network.update_routes([route(device="old", gateway="10.3.0.1")]),
            OSError,
            "route to everywhere: Network is unreachable",
        ),
        (
            lambda: network.add_neighbours([types_pb2.ARPNeighbor(device="old", lladdr="02:00")]),
            Exception,
            "neighbour",
        ),
    ],
)
def test_refusals(order: Callable[[], object], kind: type[Exception], problem: str) -> None:
    def work() -> None:
        hardware("old")
        ip("link set old up")
        with pytest.raises(kind, match=problem.replace("/", ".")):
            order()

    in_network_namespace(work)


def test_an_interface_that_comes_later() -> None:
    """The host has plugged it in, and the driver finds it while we wait."""

    async def wait_for_it() -> None:
        drivers: list[str] = []
        sandbox: Any = SimpleNamespace(load_driver=drivers.append)
        service = AgentService(sandbox, Settings(), Uevents(), Log(console_fd=None))
        request = agent_pb2.UpdateInterfaceRequest(interface=interface(0, "eth0", "10.1.0.2/24"))
        call: Any = None
        updating = asyncio.create_task(service.update_interface(request, call))
        await asyncio.sleep(0)
        hardware("enp0s3")
        assert (await updating).name == "eth0"
        assert drivers == ["virtio_net"]

    in_network_namespace(lambda: asyncio.run(wait_for_it()))


def test_an_interface_that_never_comes() -> None:
    async def wait_in_vain() -> None:
        settings = Settings()
        settings.hotplug_timeout_s = 0
        sandbox: Any = SimpleNamespace(load_driver=lambda name: None)
        service = AgentService(sandbox, settings, Uevents(), Log(console_fd=None))
        call: Any = None
        with pytest.raises(NotFound, match=MAC.format(0)):
            await service.update_interface(
                agent_pb2.UpdateInterfaceRequest(interface=interface(0, "eth0")), call
            )

    in_network_namespace(lambda: asyncio.run(wait_in_vain()))
