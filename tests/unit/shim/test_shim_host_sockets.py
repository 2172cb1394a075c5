"""Sockets of the host for containers: real sockets and both sides of the way, which here stays on this host."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from agent_proto.gen.kata_py_agent_pb2 import AcceptConnectionResponse
from agent_proto.relay import SOCKETS_PORT
from guest_agent.errors import AlreadyExists, InvalidRequest, NotFound
from guest_agent.handover import Handover
from guest_agent.host_sockets import HostSockets as GuestSockets
from guest_agent.log import Log
from shim import host_sockets
from shim.errors import NotSupported
from shim.host_sockets import DEPTH, NAMES, SOCKETS, HostSockets, find
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from agent_proto.gen.kata_py_agent_pb2 import (
        AcceptConnectionRequest,
        CloseSocketRequest,
        ListenSocketRequest,
    )

MIB = 1 << 20


class Agent:
    """The guest's side, called without a wire."""

    def __init__(self, sockets: GuestSockets) -> None:
        self._sockets = sockets

    async def listen_socket(self, request: ListenSocketRequest) -> None:
        self._sockets.listen(request.name, request.mode, request.uid, request.gid)

    async def accept_connection(self, request: AcceptConnectionRequest) -> AcceptConnectionResponse:
        try:
            return AcceptConnectionResponse(token=await self._sockets.next_connection(request.name))
        except NotFound as err:
            raise RpcError(Code.NOT_FOUND, str(err)) from err

    async def close_socket(self, request: CloseSocketRequest) -> None:
        self._sockets.close(request.name)


class Site:
    """A server's socket on the host, and what a guest has of it. It is also the guest, and its vsock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.handover = Handover(Log("error"), family=socket.AF_UNIX, address=str(root / "guest.host"))
        self.guest = GuestSockets(str(root / "guest"), self.handover)
        self.agent = Agent(self.guest)
        self.knows = True
        self.tasks: set[asyncio.Task[None]] = set()
        ours: Any = self
        self.sockets = HostSockets(ours, ours, self._in_background)
        self.path = root / "app.sock"
        self.server: asyncio.Server | None = None

    async def extended(self) -> bool:
        return self.knows

    async def connect(self, port: int) -> socket.socket:
        assert port == SOCKETS_PORT
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        connection.connect(str(self.root / "guest.host"))
        return connection

    async def serve(self) -> None:
        """Answers with the bytes in reverse order, once all are there."""
        self.server = await asyncio.start_unix_server(_reverse, self.path)
        self.path.chmod(0o640)

    async def offered(self, undo: ExitStack) -> Path:
        (found,) = find(self.path)
        path = await self.sockets.offer(found.fd, "/run/app.sock", undo)
        return self.root / "guest" / Path(path).name

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def aclose(self) -> None:
        if self.server is not None:
            self.server.close()
        for name in list(self.guest._listeners):
            self.guest.close(name)
        for token in list(self.handover._waiting):
            self.handover._give_up(token)
        tasks = {*self.tasks, *self.handover._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _reverse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    data = await reader.read()
    writer.write(data[::-1])
    writer.close()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    yield site
    await site.aclose()


async def answer(path: Path, data: bytes) -> bytes:
    """What a program of the guest gets for it."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(data)
    writer.write_eof()
    got = await reader.read()
    writer.close()
    return got


async def test_a_guest_that_was_short_of_descriptors_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    accept, short = loop.sock_accept, [OSError(errno.ENFILE, "Too many open files in system")]

    async def sock_accept(sock: socket.socket) -> tuple[socket.socket, Any]:
        if sock is site.handover._for_host and short:
            raise short.pop()
        return await accept(sock)

    monkeypatch.setattr(loop, "sock_accept", sock_accept)
    monkeypatch.setattr("guest_agent.handover.PAUSE_S", 0)
    await site.serve()
    with ExitStack() as undo:
        path = await site.offered(undo)
        async with asyncio.timeout(10):
            assert await answer(path, b"ab") == b"ba"
    assert not short


async def test_a_host_that_was_short_of_descriptors_goes_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    dup, short = os.dup, [OSError(errno.EMFILE, "Too many open files")]

    def once_short(fd: int) -> int:
        if short:
            raise short.pop()
        return dup(fd)

    monkeypatch.setattr(os, "dup", once_short)
    await site.serve()
    turns = site.sockets._turns._value
    with ExitStack() as undo:
        path = await site.offered(undo)
        refused = asyncio.create_task(answer(path, b"ab"))
        async with asyncio.timeout(10):
            while short:
                await asyncio.sleep(0)
            assert await answer(path, b"cd") == b"dc"
        refused.cancel()
        await asyncio.gather(refused, return_exceptions=True)
    async with asyncio.timeout(10):
        while site.sockets._turns._value != turns:
            await asyncio.sleep(0)


async def test_bytes_go_both_ways_and_one_way_may_end_first(site: Site) -> None:
    await site.serve()
    with ExitStack() as undo:
        path = await site.offered(undo)
        assert path.stat().st_mode & 0o7777 == 0o640
        for size in (0, 1, MIB):
            data = random.Random(size).randbytes(size)
            assert await answer(path, data) == data[::-1]


async def test_many_at_once(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond the limit wait, and get their answer too."""
    site.sockets._turns = asyncio.Semaphore(10)
    await site.serve()
    with ExitStack() as undo:
        path = await site.offered(undo)
        words = [b"%d" % number * 1000 for number in range(100)]
        answers = await asyncio.gather(*(answer(path, word) for word in words))
        assert answers == [word[::-1] for word in words]


async def test_a_server_that_is_gone_is_told_in_the_log(site: Site) -> None:
    await site.serve()
    with ExitStack() as undo, capture_logs() as lines:
        path = await site.offered(undo)
        assert site.server is not None
        site.server.close()
        assert await answer(path, b"") == b""
    assert [(line["event"], line["source"], line["reason"]) for line in lines] == [
        ("host_socket_refused", "/run/app.sock", "Connection refused")
    ]


async def test_a_guest_cannot_fill_the_log(site: Site) -> None:
    await site.serve()
    with ExitStack() as undo, capture_logs() as lines:
        path = await site.offered(undo)
        assert site.server is not None
        site.server.close()
        for _ in range(3):
            assert await answer(path, b"") == b""
    levels = [line["log_level"] for line in lines if line["event"] == "host_socket_refused"]
    assert levels == ["warning", "debug", "debug"]


async def test_full_queues_leave_threads_for_others(site: Site) -> None:
    """Those of the event loop are few, and everybody's."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(5) as few, socket.socket(socket.AF_UNIX) as listener, ExitStack() as undo:
        loop.set_default_executor(few)
        listener.bind(str(site.path))
        listener.listen(0)
        path = await site.offered(undo)
        waiting = [asyncio.create_task(answer(path, b"")) for _ in range(12)]
        while sum(task.get_name().startswith("connection") for task in site.tasks) < 12:
            await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await asyncio.to_thread(listener.close)  # now all are refused
            await asyncio.gather(*waiting)


@pytest.mark.parametrize("token", [b"", bytes(MIB)])
async def test_a_token_that_is_none_ends_it(
    site: Site, monkeypatch: pytest.MonkeyPatch, token: bytes
) -> None:
    async def accept(request: object) -> AcceptConnectionResponse:
        return AcceptConnectionResponse(token=token)

    await site.serve()
    monkeypatch.setattr(site.agent, "accept_connection", accept)
    with ExitStack() as undo, capture_logs() as lines:
        await site.offered(undo)
        async with asyncio.timeout(60):
            await asyncio.gather(*site.tasks)
    assert [(line["event"], line["reason"]) for line in lines] == [
        ("host_socket_closed", "the guest's agent broke the rules")
    ]


async def test_a_server_with_a_full_queue_is_waited_for(site: Site) -> None:
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX) as first,
        ExitStack() as undo,
    ):
        listener.bind(str(site.path))
        listener.listen(0)
        first.connect(str(site.path))
        path = await site.offered(undo)
        waiting = asyncio.create_task(answer(path, b"word"))
        while not any(task.get_name().startswith("connection") for task in site.tasks):
            await asyncio.sleep(0)
        listener.accept()[0].close()
        listener.setblocking(False)
        async with asyncio.timeout(60):
            program, _ = await asyncio.get_running_loop().sock_accept(listener)
            with program:
                assert await asyncio.get_running_loop().sock_recv(program, 10) == b"word"
                await asyncio.get_running_loop().sock_sendall(program, b"answer")
            assert await waiting == b"answer"


async def test_it_goes_with_its_container(site: Site) -> None:
    await site.serve()
    with ExitStack() as undo:
        path = await site.offered(undo)
    async with asyncio.timeout(60):
        while site.tasks:
            await asyncio.gather(*site.tasks)
    assert not path.exists()


async def test_an_agent_that_goes_on_when_the_container_is_gone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It closes nothing: neither do new connections reach the host's server then, nor do the old ones go on."""

    async def close(request: object) -> None:
        pass

    reached: list[asyncio.StreamReader] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(reader)
        await reader.read()
        writer.close()

    site.server = await asyncio.start_unix_server(serve, site.path)
    monkeypatch.setattr(site.agent, "close_socket", close)
    monkeypatch.setattr(host_sockets, "_LAST_WORDS_S", 0.0)
    async with asyncio.timeout(60):
        with (
            ExitStack() as undo,
            socket.socket(socket.AF_UNIX) as early,
            socket.socket(socket.AF_UNIX) as late,
        ):
            path = await site.offered(undo)
            early.connect(str(path))
            while not reached:
                await asyncio.sleep(0)
            undo.close()
            late.connect(str(path))
            while site.tasks:
                await asyncio.gather(*site.tasks)
            assert await reached[0].read() == b""
    assert len(reached) == 1
    assert site.sockets._turns._value == host_sockets.CONNECTIONS


async def test_another_socket_of_the_same_name_is_not_reached(site: Site) -> None:
    """Who may write to the directory cannot choose what is connected to."""
    await site.serve()
    secret = await asyncio.start_unix_server(lambda reader, writer: writer.close(), site.root / "secret.sock")
    with ExitStack() as undo, capture_logs():
        path = await site.offered(undo)
        site.path.unlink()
        site.path.symlink_to(site.root / "secret.sock")
        assert await answer(path, b"word") == b"drow"
    secret.close()


async def test_agents_without_such_sockets(site: Site) -> None:
    await site.serve()
    site.knows = False
    with ExitStack() as undo, pytest.raises(NotSupported, match=r"proxy_host_sockets .* remove it"):
        await site.offered(undo)


async def test_strangers_get_nothing(site: Site) -> None:
    """Somebody in the guest who connects to the port for the host, without a token or with a wrong one."""
    await site.serve()
    with ExitStack() as undo:
        path = await site.offered(undo)
        for token in (b"", b"short", bytes(16)):
            assert await answer(site.root / "guest.host", token) == b""
        assert await answer(path, b"word") == b"drow"


async def test_names_of_the_guest(site: Site) -> None:
    site.guest.listen("a", 0o600, os.getuid(), os.getgid())
    with pytest.raises(AlreadyExists):
        site.guest.listen("a", 0o600, 0, 0)
    for name in ("", ".", "..", "a/b", "a\0"):
        with pytest.raises(InvalidRequest):
            site.guest.listen(name, 0o600, 0, 0)
    with pytest.raises(NotFound):
        await site.guest.next_connection("b")
    site.guest.close("a")
    site.guest.close("a")


def places(path: Path) -> list[str]:
    found = list(find(path))
    for _, fd in found:
        os.close(fd)
    return sorted(place for place, _ in found)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        path.parent.mkdir(parents=True, exist_ok=True)
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def test_where_sockets_are_found(tmp_path: Path) -> None:
    top = tmp_path / "top"
    bound(tmp_path / "outside" / "o.sock")
    for place in ("a.sock", "b/c.sock", "/".join("d" * (DEPTH - 1)) + "/deep.sock"):
        bound(top / place)
    bound(top / "/".join("d" * DEPTH) / "too-deep.sock")
    (top / "file").touch()
    os.mkfifo(top / "fifo")
    (top / "link.sock").symlink_to(tmp_path / "outside" / "o.sock")
    (top / "linked").symlink_to(tmp_path / "outside")
    with capture_logs() as lines:
        assert places(top) == ["a.sock", "b/c.sock", "d/d/d/deep.sock"]
    assert [line["event"] for line in lines] == ["sockets_not_all_found"]
    assert places(top / "a.sock") == [""]
    assert places(top / "file") == []
    assert places(top / "link.sock") == []


def test_not_without_end(tmp_path: Path) -> None:
    for number in range(SOCKETS + 1):
        bound(tmp_path / "many" / f"{number}.sock")
    (tmp_path / "large").mkdir()
    for number in range(NAMES + 1):
        (tmp_path / "large" / str(number)).touch()
    with capture_logs() as lines:
        assert len(places(tmp_path / "many")) == SOCKETS
        assert places(tmp_path / "large") == []
    assert [line["event"] for line in lines] == ["sockets_not_all_found"] * 2
    assert host_sockets.CONNECTIONS == 256
