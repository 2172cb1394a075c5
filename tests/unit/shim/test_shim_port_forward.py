"""Connections in a pod's namespace that reach programs of the guest: with the real kernel and both sides of the way,
which here stays on this host. What is the guest's loopback in earnest is that of another namespace."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from agent_proto.gen.kata_py_agent_pb2 import ConnectPortResponse
from agent_proto.relay import SOCKETS_PORT
from guest_agent import ports
from guest_agent.errors import InvalidRequest, NotFound
from guest_agent.handover import Handover
from guest_agent.log import Log
from hypervisor.netns import entered, new_netns
from oci_engine import bpf
from shim import port_forward, steering
from shim.pod import Pod
from shim.port_forward import PortForward, namespace_of
from tests.support.namespaces import in_network_namespace
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from agent_proto.gen.kata_py_agent_pb2 import ConnectPortRequest

LOOPBACK = "127.0.0.1"


class Site:
    """The guest, its agent and its vsock, and the pod's namespace on the host."""

    def __init__(self, folder: str) -> None:
        self.address = f"{folder}/guest.host"
        self.handover = Handover(Log("error"), family=socket.AF_UNIX, address=self.address)
        self.agent = self
        self.knows = True
        self.asked: list[int] = []
        self.netns = Path(f"/proc/self/fd/{new_netns()}")
        for where in (self.netns, None):
            with entered(where):
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        ours: Any = self
        self.forward = PortForward(ours, ours, self.netns)
        self.forwarding: asyncio.Task[None]

    async def extended(self) -> bool:
        return self.knows

    async def connect_port(self, request: ConnectPortRequest) -> ConnectPortResponse:
        self.asked.append(request.port)
        try:
            return ConnectPortResponse(token=await ports.connect(request.port, self.handover))
        except NotFound as err:
            raise RpcError(Code.NOT_FOUND, str(err)) from err

    async def connect(self, port: int) -> socket.socket:
        assert port == SOCKETS_PORT
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        connection.connect(self.address)
        return connection

    async def connected(
        self, port: int, host: str = LOOPBACK
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """As a program in the pod's namespace."""
        with entered(self.netns):
            client = socket.create_connection((host, port))
        client.setblocking(False)
        return await asyncio.open_connection(sock=client)


async def _reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        writer.write((await reader.read())[::-1])
        await writer.drain()
    writer.close()


def serving(work: Callable[[Site, int], Awaitable[None]], host: str = LOOPBACK) -> None:
    """Does the work in namespaces of its own, while a server of the guest, whose port it is given, answers with the
    same bytes in reverse order."""

    async def run() -> None:
        with TemporaryDirectory() as folder:
            site = Site(folder)
            server = await asyncio.start_server(_reverse, host, 0)
            forwarding = site.forwarding = asyncio.create_task(site.forward.serve())
            await asyncio.sleep(0)  # that is all until it listens
            try:
                async with asyncio.timeout(60):
                    await work(site, server.sockets[0].getsockname()[1])
            finally:
                forwarding.cancel()
                server.close()
                tasks = {forwarding, *site.handover._tasks}
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    in_network_namespace(lambda: asyncio.run(run()))


async def answer_to(data: bytes, site: Site, port: int, host: str = LOOPBACK) -> bytes:
    reader, writer = await site.connected(port, host)
    writer.write(data)
    writer.write_eof()
    try:
        return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("host", [LOOPBACK, "::1"])
@pytest.mark.parametrize("server", [LOOPBACK, "::1"])
def test_bytes_go_both_ways_and_each_ends_by_itself(host: str, server: str) -> None:
    async def work(site: Site, port: int) -> None:
        data = os.urandom(1 << 20)
        assert await answer_to(data, site, port, host) == data[::-1]

    serving(work, server)


def test_many_at_once() -> None:
    async def work(site: Site, port: int) -> None:
        many = [os.urandom(30_000) for _ in range(40)]
        answers = await asyncio.gather(*(answer_to(data, site, port) for data in many))
        assert answers == [data[::-1] for data in many]

    serving(work)


def test_it_is_gone_with_a_process_that_is_killed() -> None:
    def work() -> None:
        netns = Path(f"/proc/self/fd/{new_netns()}")
        with entered(netns):
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            with steering.steered(netns):
                os.write(writer, b"!")
                signal.pause()
        os.close(writer)
        try:
            assert os.read(reader, 1) == b"!"
            with entered(netns):
                socket.create_connection((LOOPBACK, 1)).close()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        with entered(netns), pytest.raises(ConnectionRefusedError):
            socket.create_connection((LOOPBACK, 1))

    in_network_namespace(work)


def test_a_port_where_nobody_listens_is_a_reset() -> None:
    async def work(site: Site, port: int) -> None:
        with capture_logs() as logs, pytest.raises(ConnectionResetError):
            await answer_to(b"x", site, 1)
        failed = [entry for entry in logs if entry["event"] == "port_connection_failed"]
        assert [(entry["port"], entry["reason"]) for entry in failed] == [
            (1, "nobody listens at port 1 of the guest's loopback")
        ]
        assert await answer_to(b"on", site, port) == b"no"

    serving(work)


def test_the_namespace_itself_comes_first_and_other_addresses_stay() -> None:
    async def work(site: Site, port: int) -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"here")
            writer.close()

        with entered(site.netns):
            listener = socket.create_server((LOOPBACK, port))
        here = await asyncio.start_server(greet, sock=listener)
        assert await answer_to(b"", site, port) == b"here"
        assert site.asked == []
        here.close()
        await here.wait_closed()
        assert await answer_to(b"ab", site, port) == b"ba"
        with pytest.raises(ConnectionRefusedError):
            await site.connected(port, "127.0.0.2")

    serving(work)


def test_the_port_of_this_process_itself_is_the_guests_too() -> None:
    async def work(site: Site, port: int) -> None:
        with entered(site.netns):
            listening = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
        (own_port,) = (int(line.split()[1].partition(":")[2], 16) for line in listening)
        with pytest.raises(ConnectionResetError):
            await answer_to(b"x", site, own_port)
        assert site.asked == [own_port]

    serving(work)


def test_more_connections_than_are_served_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_forward, "CONNECTIONS", 1)

    async def work(site: Site, port: int) -> None:
        _, first = await site.connected(port)
        reader, second = await site.connected(port)
        second.write(b"ab")
        second.write_eof()
        waiting = asyncio.create_task(reader.read())
        assert not (await asyncio.wait([waiting], timeout=0.2))[0]
        first.close()
        assert await waiting == b"ba"
        second.close()

    serving(work)


def test_an_agent_that_cannot_is_told_of_once_and_then_it_is_as_without() -> None:
    async def work(site: Site, port: int) -> None:
        site.knows = False
        with capture_logs() as logs:
            with pytest.raises(ConnectionResetError):
                await answer_to(b"x", site, port)
            await site.forwarding
            with pytest.raises(ConnectionRefusedError):
                await site.connected(port)
        assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == [
            "ports_not_forwarded"
        ]

    serving(work)


def test_a_kernel_without_such_programs_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int, entries: int) -> int:
        raise OSError(errno.EINVAL, "bpf: Invalid argument")

    monkeypatch.setattr(bpf, "new_map", refuse)

    async def work(site: Site, port: int) -> None:
        with capture_logs() as logs:
            await site.forward.serve()
        assert [(entry["event"], entry["reason"]) for entry in logs] == [
            ("ports_not_forwarded", "bpf: Invalid argument")
        ]
        with pytest.raises(ConnectionRefusedError):
            await site.connected(port)

    serving(work)
    assert steering.why_not() == "bpf: Invalid argument"


def test_only_pods_with_a_namespace_of_their_own() -> None:
    netns = Path("/run/netns/one")
    assert namespace_of(Pod(name="web", netns=netns)) == netns
    assert namespace_of(Pod(netns=netns)) is None
    assert namespace_of(Pod(name="web")) is None
    assert namespace_of(Pod(name="web", netns=Path(f"/proc/{os.getpid()}/ns/net"))) is None


@pytest.mark.parametrize("port", [0, 65536])
async def test_the_agent_refuses_what_is_no_port(port: int) -> None:
    with pytest.raises(InvalidRequest, match=str(port)):
        await ports.connect(port, Handover(Log("error"), family=socket.AF_UNIX, address=""))


def test_nobody_is_not_taken_for_somebody_because_of_our_own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP connects a socket to itself when it comes from the port that it goes to."""
    monkeypatch.setattr("random.sample", lambda ports, count: [*ports][:count])

    def work() -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        here = Path("/proc/self/ns/net")
        assert asyncio.run(steering.listener_here(here, socket.AF_INET, 512)) is None

    in_network_namespace(work)


async def test_a_server_of_ipv6_whose_queue_is_full_is_not_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(sock: socket.socket, address: object) -> None:
        if sock.family == socket.AF_INET:
            raise ConnectionRefusedError
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", connect)
    monkeypatch.setattr(ports, "CONNECT_LIMIT_S", 0)
    handover: Any = SimpleNamespace(prepare=lambda: None)
    with pytest.raises(TimeoutError):
        await ports.connect(80, handover)
