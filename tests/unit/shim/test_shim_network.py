"""The pod's network while its machine runs: what is plugged, joined and told, and what happens when something fails.

Interfaces are real, in a namespace of the test's own; QEMU and the guest's agent are not.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from config.schema import Qemu
from hypervisor.errors import HostUnsupported, HotplugRefused
from hypervisor.qemu.nic import opened
from hypervisor.spec import Nic
from shim.dan import Device, DirectDevice, DirectInterface, DirectNetwork, DirectRoute, NetworkInfo
from shim.errors import NetworkNotMirrored
from shim.network import DirectPodNetwork, PodNetwork, forget
from tests.support.namespaces import in_network_namespace
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent_proto.gen import kata_py_agent_pb2

OWN = "/proc/self/ns/net"


def ip(words: str) -> str:
    return subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True).stdout


def redirected() -> list[str]:
    """The interfaces whose incoming packets go elsewhere."""
    shown = subprocess.run(["tc", "qdisc", "show"], check=True, capture_output=True, text=True).stdout
    return sorted(line.split()[4] for line in shown.splitlines() if line.split()[1] == "ingress")


class Guest:
    """Machine and agent in one: what they are asked for, in order. A tap of the machine is a bridge here."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.mirrored: list[kata_py_agent_pb2.MirrorNetworkRequest] = []
        self.extended = True
        self.refuse: Exception | None = None
        self._news = asyncio.Event()

    async def until(self, asked: str) -> None:
        while asked not in self.asked:
            self._news.clear()
            await self._news.wait()

    async def plug_nic(self, nic: Nic) -> None:
        self._note(f"plug {nic.id} {nic.mac}")
        ip(f"link add name {nic.tap} type bridge")

    async def unplug_nic(self, nic_id: str) -> None:
        self._note(f"unplug {nic_id}")
        tap = f"tap{nic_id.removeprefix('nic')}_kata"
        if f" {tap}: " in ip("link"):  # not parted before
            ip(f"link delete {tap}")

    async def update_interface(self, request: Any) -> None:
        given = request.interface
        addresses = " ".join(a.address for a in given.IPAddresses if not a.address.startswith("fe80"))
        self._note(f"{given.name} mtu {given.mtu} {addresses}".strip())

    async def update_routes(self, request: Any) -> None:
        self._note(f"routes {' '.join(route.dest or 'default' for route in request.routes.Routes)}".strip())

    async def add_arp_neighbors(self, request: Any) -> None:
        entries = request.neighbors.ARPNeighbors
        self._note(f"neighbours {' '.join(entry.toIPAddress.address for entry in entries)}")

    async def mirror_network(self, request: kata_py_agent_pb2.MirrorNetworkRequest) -> None:
        if not self.extended:
            self._note("not mirrored")
            raise RpcError(Code.UNIMPLEMENTED, "no such service")
        self.mirrored.append(request)
        words = [
            f"{rule.source or rule.destination} {rule.table}" for rule in request.rules if rule.table < 253
        ]
        routes = sorted(f"{route.destination or 'default'} {route.table}" for route in request.routes)
        neighbours = [neighbour.address for neighbour in request.neighbours]
        self._note("; ".join(map(" ".join, (["mirror", *words], routes, neighbours))))

    def _note(self, text: str) -> None:
        self.asked.append(text)
        self._news.set()
        if self.refuse is not None:
            raised, self.refuse = self.refuse, None
            raise raised


def with_network(work: Callable[[PodNetwork, Any, list[list[int]]], Awaitable[None]], *orders: str) -> None:
    """Run `work` with a network in a namespace that `orders` have prepared, and find nothing of it afterwards."""

    async def run() -> None:
        for order in orders:
            ip(order)
        guest: Any = Guest()
        remembered: list[list[int]] = []
        network = PodNetwork(
            Path(OWN), Qemu(), lambda netns, ifindexes: remembered.append(ifindexes), mirrored=True
        )
        for nic in network.nics:
            ip(f"link add name {nic.tap} type bridge")
        try:
            async with asyncio.timeout(15):
                await work(network, guest, remembered)
        finally:
            network.close()
            network.close()
        assert [name for name in redirected() if not name.endswith("_kata")] == []

    in_network_namespace(lambda: asyncio.run(run()))


ETH0 = (
    "link add eth0 address 0a:58:0a:d5:00:02 type veth peer name far",
    "link set far up",
    "link set eth0 up",
    "address add 10.1.0.2/24 dev eth0",
    "route add default via 10.1.0.1",
)


def test_what_is_there_at_first() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        # `far` is an interface of this namespace as well.
        eth0 = next(nic for nic in network.nics if nic.mac == "0a:58:0a:d5:00:02")
        assert (eth0.queues, eth0.vhost) == (1, True)
        network.join()
        assert set(redirected()) >= {"eth0", eth0.tap}
        assert sorted(remembered[-1]) == sorted(int(nic.id.removeprefix("nic")) for nic in network.nics)
        await network.tell(guest)
        assert {"eth0 mtu 1500 10.1.0.2", "routes default"} <= set(guest.asked)
        told = len(guest.asked)
        await network.tell(guest)
        assert len(guest.asked) == told
        network.part()
        for nic in network.nics:  # of another machine
            ip(f"link add name {nic.tap} type bridge")
        network.join()
        await network.tell(guest)
        assert len(guest.asked) == 2 * told

    with_network(work, *ETH0)


def test_changes_reach_the_guest() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        following = asyncio.create_task(network.follow(guest, guest))
        for order in (*ETH0[:1], *ETH0[2:4]):
            ip(order)
        await guest.until("eth0 mtu 1500 10.1.0.2")
        plugged = next(asked for asked in guest.asked if asked.startswith("plug"))
        assert plugged.endswith(" 0a:58:0a:d5:00:02")
        assert "eth0" in redirected()
        ip("route add 10.9.0.0/16 via 10.1.0.9")
        await guest.until("routes 10.9.0.0/16")
        ip("link set eth0 mtu 1400")
        await guest.until("eth0 mtu 1400 10.1.0.2")
        ip("neighbour add 10.1.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")
        await guest.until("neighbours 10.1.0.9")
        ip("link delete far")
        await guest.until(f"un{plugged.rpartition(' ')[0]}")
        following.cancel()
        await asyncio.wait([following])

    with_network(work)


# As the plugin sbr leaves an interface.
SBR = (
    "rule add from 10.1.0.2 lookup 100",
    "route add 10.1.0.0/24 dev eth0 table 100",
    "route add default via 10.1.0.1 table 100",
)


def test_what_the_agents_own_words_cannot_say() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        following = asyncio.create_task(network.follow(guest, guest))
        await network.tell(guest)
        assert "eth0 mtu 1500 10.1.0.2" in guest.asked
        tables = "10.1.0.0/24 100 10.1.0.0/24 254 default 100"
        assert guest.asked[-1] == f"mirror 10.1.0.2/32 100; {tables}; "
        assert not any(asked.startswith("routes") for asked in guest.asked)
        ip("rule add to 10.8.0.0/16 lookup 101")
        await guest.until(f"mirror 10.8.0.0/16 101 10.1.0.2/32 100; {tables}; ")
        ip("neighbour add 10.1.0.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent")
        await guest.until(f"mirror 10.8.0.0/16 101 10.1.0.2/32 100; {tables}; 10.1.0.9")
        # That all is gone is told by the same words: the others know nothing of tables.
        ip("neighbour delete 10.1.0.9 dev eth0")
        ip("rule flush")
        ip("rule add lookup main priority 32766")
        ip("rule add lookup default priority 32767")
        ip("route flush table 100")
        await guest.until("mirror; 10.1.0.0/24 254; ")
        following.cancel()
        await asyncio.wait([following])
        network.part()
        guest.asked.clear()
        await network.catch_up(guest, guest)
        # What the next machine has is an ordinary network.
        assert "routes" in guest.asked
        assert not any(asked.startswith("mirror") for asked in guest.asked)

    with_network(work, *ETH0[:4], *SBR)


def test_an_agent_without_our_extension_is_told_what_it_has_words_for() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        guest.extended = False
        with capture_logs() as logs:
            await network.tell(guest)
            assert guest.asked[-2:] == ["not mirrored", "routes default"]
            for order in ("rule add from 10.1.0.9 lookup 100", "route add 10.9.0.0/16 via 10.1.0.9"):
                ip(order)
                await network.catch_up(guest, guest)
            assert guest.asked.count("not mirrored") == 1
            assert guest.asked[-1] == "routes default 10.9.0.0/16"
        (line,) = [line for line in logs if line["event"] == "network_partly_mirrored"]
        assert line["not_brought"] == ["rules", "routing tables"]
        assert "the guest's agent has no words for them" in line["reason"]

    with_network(work, *ETH0, *SBR)


def test_an_agent_without_our_extension_is_not_told_less_than_what_keeps_packets_away() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        guest.extended = False
        words = "cannot be told of route to 10.9.0.0/16, rule 7 of the pod, which is to keep packets away"
        for _ in range(2):
            with pytest.raises(NetworkNotMirrored, match=words):
                await network.tell(guest)

    with_network(
        work, *ETH0, "route add prohibit 10.9.0.0/16", "rule add to 10.8.0.0/16 priority 7 blackhole"
    )


def test_a_network_out_of_a_file_has_no_more_than_the_agents_own_words() -> None:
    """Metrics of IPv6 routes, and the routes of networks, are not in the file; that they are missing means nothing."""
    info = NetworkInfo(
        interface=DirectInterface(ip_addresses=("10.1.0.2/24", "fd00::2/64")),
        routes=(DirectRoute(gateway="10.1.0.1"), DirectRoute(dest="fd07::/48", gateway="fd00::1")),
    )
    device = Device(type="host-tap", tap_name="given")
    described = DirectNetwork((DirectDevice("lan0", "0a:58:0a:d7:00:02", device, info),))

    async def work() -> None:
        guest: Any = Guest()
        network = DirectPodNetwork(None, Qemu(), described)
        await network.tell(guest)
        assert guest.asked == ["lan0 mtu 1500 10.1.0.2 fd00::2", "routes default fd07::/48"]
        network.close()

    asyncio.run(work())


def test_what_nobody_can_say_is_named() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        with capture_logs() as logs:
            await network.tell(guest)
            ip("link set eth0 mtu 1400")
            await network.catch_up(guest, guest)
        (line,) = [line for line in logs if line["event"] == "network_partly_mirrored"]
        assert line["not_brought"] == ["route to 10.9.0.0/16"]

    with_network(work, *ETH0, "route add 10.9.0.0/16 via 10.1.0.9 realm 7")


def test_who_gives_up_waiting_leaves_no_half_of_an_interface() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        go_on, plug = asyncio.Event(), guest.plug_nic

        async def slowly(nic: Nic) -> None:
            guest._note("begun")
            await go_on.wait()
            await plug(nic)

        guest.plug_nic = slowly
        for order in ETH0:
            ip(order)
        waiting = asyncio.create_task(network.catch_up(guest, guest))
        await guest.until("begun")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        await guest.until("eth0 mtu 1500 10.1.0.2")
        assert "eth0" in redirected()

    with_network(work)


@pytest.mark.parametrize(
    ("refusal", "event"),
    [
        (HotplugRefused("all ports are taken"), "interface_not_mirrored"),
        (RpcError(Code.INTERNAL, "no"), "network_change_not_mirrored"),
    ],
)
def test_a_change_that_fails_is_told_and_the_next_one_is_not_lost(refusal: Exception, event: str) -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        with capture_logs() as logs:
            following = asyncio.create_task(network.follow(guest, guest))
            await asyncio.sleep(0)
            guest.refuse = refusal
            for order in ETH0[:4]:
                ip(order)
            ip("link set eth0 mtu 1300")
            await guest.until("eth0 mtu 1300 10.1.0.2")
            following.cancel()
            await asyncio.wait([following])
        assert event in [line["event"] for line in logs]

    with_network(work)


def slowly_unplugged(guest: Any) -> asyncio.Event:
    """The guest lets go of interfaces when the event is set."""
    let_go, unplug = asyncio.Event(), guest.unplug_nic

    async def unplug_nic(nic_id: str) -> None:
        guest._note(f"asked to give {nic_id}")
        await let_go.wait()
        await unplug(nic_id)

    guest.unplug_nic = unplug_nic
    return let_go


def test_nobody_waits_for_an_interface_that_goes() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        network.join()
        let_go = slowly_unplugged(guest)
        leaving = next(nic for nic in network.nics if nic.mac == "0a:58:0a:d5:00:02")
        ip("link delete eth0")
        ip("link add eth1 type veth peer name far1")
        ip("link set eth1 up")
        await network.catch_up(guest, guest)
        assert any(asked.startswith("plug nic") for asked in guest.asked)
        await guest.until(f"asked to give {leaving.id}")
        assert f"unplug {leaving.id}" not in guest.asked
        let_go.set()
        await guest.until(f"unplug {leaving.id}")

    with_network(work, *ETH0)


def test_who_needs_the_place_of_one_that_goes_waits_for_it() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        network.join()
        let_go = slowly_unplugged(guest)
        leaving = next(nic for nic in network.nics if nic.mac == "0a:58:0a:d5:00:02")
        ip("link set eth0 address 0a:58:0a:d5:00:03")
        changing = asyncio.create_task(network.catch_up(guest, guest))
        await guest.until(f"asked to give {leaving.id}")
        assert not changing.done()
        let_go.set()
        await changing
        unplugged = guest.asked.index(f"unplug {leaving.id}")
        assert f"plug {leaving.id} 0a:58:0a:d5:00:03" in guest.asked[unplugged:]
        # And one for which there is no place before that.
        let_go.clear()
        ip("link delete eth0")
        ip("link add eth1 address 0a:58:0a:d5:00:04 type veth peer name far1")
        ip("link set eth1 up")
        guest.refuse = None
        plug, refused = guest.plug_nic, list[str]()

        async def plug_nic(nic: Nic) -> None:
            if not refused:
                refused.append(nic.mac)
                raise HotplugRefused("all ports are taken")
            await plug(nic)

        guest.plug_nic = plug_nic
        changing = asyncio.create_task(network.catch_up(guest, guest))
        while not refused:
            await asyncio.sleep(0)
        let_go.set()
        await changing
        assert refused == ["0a:58:0a:d5:00:04"]

    with_network(work, *ETH0)


def test_the_mac_address_of_one_that_goes_is_free_when_it_has_gone() -> None:
    """The guest would take the old interface for the new one. Docker makes MAC addresses of IP addresses."""

    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        network.join()
        let_go = slowly_unplugged(guest)
        leaving = next(nic for nic in network.nics if nic.mac == "0a:58:0a:d5:00:02")
        again = "link add eth0 index 4000 address 0a:58:0a:d5:00:02 type veth peer name far"
        for order in ("link delete eth0", again, "link set eth0 up"):
            ip(order)
        changing = asyncio.create_task(network.catch_up(guest, guest))
        await guest.until(f"asked to give {leaving.id}")
        assert not any(asked.startswith("plug") for asked in guest.asked)
        let_go.set()
        await changing
        unplugged = guest.asked.index(f"unplug {leaving.id}")
        assert guest.asked[unplugged + 1 :][:1] == ["plug nic4000 0a:58:0a:d5:00:02"]
        # And one that it keeps.
        for order in ("link delete eth0", again.replace("4000", "4001"), "link set eth0 up"):
            ip(order)
        unplug = guest.unplug_nic

        async def kept(nic_id: str) -> None:
            raise HotplugRefused("the guest keeps it")

        guest.unplug_nic = kept
        with pytest.raises(HotplugRefused, match="not let go of an earlier one with the MAC address 0a:58"):
            await network.catch_up(guest, guest)
        guest.unplug_nic = unplug
        await network.catch_up(guest, guest)
        assert "plug nic4001 0a:58:0a:d5:00:02" in guest.asked

    with_network(work, *ETH0)


def test_an_interface_that_the_guest_keeps_is_asked_for_again() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        network.join()
        ip("link delete eth0")
        guest.refuse = HotplugRefused("the guest keeps it")
        with capture_logs() as lines:
            await network.catch_up(guest, guest)
            while not lines:
                await asyncio.sleep(0)
        assert [(line["event"], line["reason"]) for line in lines] == [
            ("interface_not_unplugged", "the guest keeps it")
        ]
        before = [asked for asked in guest.asked if asked.startswith("unplug")]
        await network.catch_up(guest, guest)
        await asyncio.sleep(0)
        # Not the other one, which has gone.
        assert [asked for asked in guest.asked if asked.startswith("unplug")] == [*before, before[0]]

    with_network(work, *ETH0)


def test_an_interface_that_no_guest_can_have() -> None:
    def work() -> None:
        ip("tuntap add tun0 mode tun")
        ip("link set tun0 up")
        with pytest.raises(NetworkNotMirrored, match="tun0"):
            PodNetwork(Path(OWN), Qemu(), lambda netns, ifindexes: None, mirrored=True)

    in_network_namespace(work)


def test_a_later_process_undoes_what_is_left(tmp_path: Path) -> None:
    def work() -> None:
        for order in ETH0:
            ip(order)
        network = PodNetwork(Path(OWN), Qemu(), lambda netns, ifindexes: None, mirrored=True)
        for nic in network.nics:
            ip(f"link add name {nic.tap} type bridge")
        network.join()
        assert "eth0" in redirected()
        ifindexes = [int(nic.id.removeprefix("nic")) for nic in network.nics]
        for _ in range(2):
            forget(OWN, [*ifindexes, 999])
            assert "eth0" not in redirected()
        forget(str(tmp_path / "nowhere"), ifindexes)

    in_network_namespace(work)


def macvtaps() -> list[str]:
    return sorted(line.split("@")[0] for line in ip("-br link show type macvtap").splitlines())


def limits() -> list[tuple[str, str]]:
    """Interfaces with a limit, and the limit."""
    found = []
    for link in ip("-br link").splitlines():
        name = link.split()[0].partition("@")[0]
        shown = subprocess.run(
            ["tc", "class", "show", "dev", name], check=True, capture_output=True, text=True
        )
        found += [(name, line.partition(" rate ")[2].split()[0]) for line in shown.stdout.splitlines()]
    return sorted(found)


@pytest.mark.parametrize("macvtap", [False, True])
def test_rates_are_limited(*, macvtap: bool) -> None:
    async def run() -> None:
        for order in ETH0:
            ip(order)
        ip("link set far down")
        eth0 = next(line.split(":")[0] for line in ip("-o link show eth0").splitlines())
        settings = Qemu(rx_rate_limiter_max_rate=3_000_000, tx_rate_limiter_max_rate=5_000_000)
        with ExitStack() as undo:
            network = PodNetwork(
                Path(OWN), settings, lambda netns, ifindexes: None, mirrored=True, macvtap=macvtap
            )
            for nic in network.nics:
                assert len(opened(nic, undo).tap) == 1
            network.join()
            towards = "ifb" if macvtap else "tap"
            assert limits() == [("eth0", "5Mbit"), (f"{towards}{eth0}_kata", "3Mbit")]
            assert redirected() == (["eth0"] if macvtap else ["eth0", f"tap{eth0}_kata"])
            network.part()
            network.part()
            assert [entry for entry in limits() if entry[0] == "eth0"] == []
            assert "kata" not in ip("link")
            network.close()

    in_network_namespace(lambda: asyncio.run(run()))


def test_a_rate_that_cannot_be_limited_is_named() -> None:
    async def work(network: PodNetwork, guest: Any, remembered: list[list[int]]) -> None:
        network._settings = Qemu(tx_rate_limiter_max_rate=8000)
        subprocess.run(["tc", "qdisc", "add", "dev", "eth0", "root", "pfifo"], check=True)
        with pytest.raises(
            HostUnsupported, match=r"tx_rate_limiter_max_rate: .* eth0 .*something else manages"
        ):
            network.join()

    with_network(work, *ETH0[:1], *ETH0[2:])


def test_macvtaps_are_made_opened_and_removed() -> None:
    def work() -> None:
        for order in ETH0:
            ip(order)
        ip("link set far down")
        remembered: list[list[int]] = []
        network = PodNetwork(
            Path(OWN),
            Qemu(network_queues=2),
            lambda _, indices: remembered.append(indices),
            mirrored=True,
            macvtap=True,
        )
        (nic,) = network.nics
        # Who finds the record after a crash knows of the macvtap before it exists.
        assert (remembered, macvtaps()) == ([[nic.parent]], [])
        with ExitStack() as undo:
            first, second = opened(nic, undo).tap
            network.join()
            assert macvtaps() == [nic.tap]
            assert nic.mac in ip(f"link show {nic.tap}")
            far = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5))
            ip("link set far up")
            with far:
                far.bind(("far", 0x88B5))
                # The kernel turns a link that has come up on a little later, and drops what is sent before.
                far.settimeout(0.2)
                frame = bytes.fromhex("ffffffffffff") + bytes(6) + b"\x88\xb5" + b"from the guest".ljust(46)
                arrived = b""
                while not arrived:
                    os.write(first, bytes(10) + frame)
                    with suppress(TimeoutError):
                        arrived = far.recv(100)
                assert arrived == frame
                back = bytes.fromhex("0a580ad50002") + bytes(6) + b"\x88\xb6" + b"to the guest".ljust(46)
                ready = select.poll()
                for fd in (first, second):
                    ready.register(fd, select.POLLIN)
                seen = b""
                while not seen.endswith(back):
                    far.send(back)
                    for fd, _ in ready.poll(200):
                        seen = os.read(fd, 2000)
        assert macvtaps() == [nic.tap]  # with no descriptor left
        with (
            pytest.raises(HostUnsupported, match=r"interface eth0 of the pod \(veth\): "),
            ExitStack() as undo,
        ):
            opened(nic, undo)
        forget(OWN, remembered[-1])
        assert macvtaps() == []
        network.close()

    in_network_namespace(work)


def test_taps_with_several_queues_and_taps_of_others() -> None:
    def work() -> None:
        with ExitStack() as undo:
            own = Nic(id="nic2", mac="0a:58:0a:d5:00:02", tap="tap2_kata", queues=3)
            assert len(opened(own, undo).tap) == 3
            shown = ip("-d link show tap2_kata")
            for words in ("type tap", "vnet_hdr on", "multi_queue numqueues 3"):
                assert words in shown
        assert "tap2_kata" not in ip("link")
        theirs = replace(own, tap="given", queues=1, existing=True)
        with pytest.raises(HostUnsupported, match="there is no tap given"), ExitStack() as undo:
            opened(theirs, undo)
        ip("tuntap add given mode tap")
        with ExitStack() as undo:
            assert len(opened(theirs, undo).tap) == 1
            with pytest.raises(HostUnsupported, match="cannot make the tap given: the name is taken"):
                opened(theirs, undo)
        assert "given" in ip("link")

    in_network_namespace(work)


def test_interfaces_that_no_macvtap_can_be_on() -> None:
    def work() -> None:
        for order in ETH0:
            ip(order)
        ip("link set far down")
        ip("link add name br0 type bridge")
        ip("link set eth0 master br0")
        network = PodNetwork(Path(OWN), Qemu(), lambda _, indices: None, mirrored=True, macvtap=True)
        (nic,) = network.nics
        words = r"interface eth0 of the pod .veth.: something else takes its packets already; set internetworking_model"
        with pytest.raises(HostUnsupported, match=words), ExitStack() as undo:
            opened(nic, undo)
        ip("link set eth0 nomaster")
        ip("link add link eth0 name mac0 type macvlan mode bridge")
        ip("link set mac0 up")
        network = PodNetwork(Path(OWN), Qemu(), lambda _, indices: None, mirrored=True, macvtap=True)
        mac0 = next(nic for nic in network.nics if nic.mac in ip("link show mac0"))
        with (
            pytest.raises(HostUnsupported, match=r"mac0 of the pod .macvlan.: Invalid argument"),
            ExitStack() as undo,
        ):
            opened(mac0, undo)
        ip("link delete mac0")
        with pytest.raises(HostUnsupported, match="is gone"), ExitStack() as undo:
            opened(mac0, undo)
        assert macvtaps() == []

    in_network_namespace(work)
