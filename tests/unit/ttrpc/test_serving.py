"""Listening, accepting, closing; nothing is left over."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from tests.unit.ttrpc.peer import ECHO, Peer, failure, request, text
from ttrpc import Call, Client, Code, ConnectionClosed, RpcError, Server
from ttrpc.acceptor import Acceptor

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    Connect = Callable[[Server], AbstractAsyncContextManager[Peer]]


async def echo(message: StringValue, call: Call) -> StringValue:
    return message


class Gate:
    """A handler that says when it runs and ends when it is told to."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.cancelled = False

    async def __call__(self, message: StringValue, call: Call) -> StringValue:
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return message


def echo_server(handler: Any = echo) -> Server:
    server = Server()
    server.register(ECHO, {"Unary": handler})
    return server


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(128)
    return listener


async def unary(client: Client, value: str = "hi") -> str:
    answer: StringValue = await client.call("t.Echo", ECHO["Unary"], StringValue(value=value), timeout_s=10)
    return answer.value


async def test_many_clients_of_a_unix_socket(tmp_path: Path) -> None:
    server = echo_server()
    serving = asyncio.create_task(server.serve(listening(tmp_path / "s")))
    clients = await asyncio.gather(*(Client.connect_unix(tmp_path / "s") for _ in range(100)))
    values = [str(number) for number in range(100)]
    pairs = zip(clients, values, strict=True)
    assert await asyncio.gather(*(unary(client, value) for client, value in pairs)) == values
    await asyncio.gather(*(client.aclose() for client in clients[:50]))
    await server.aclose()
    await serving
    await asyncio.gather(*(client.wait_closed() for client in clients))
    with pytest.raises(ConnectionRefusedError):
        await Client.connect_unix(tmp_path / "s")


async def test_connecting_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await Client.connect_unix(str(tmp_path / "none"))


async def test_two_listeners(tmp_path: Path) -> None:
    server = echo_server()
    serving = [asyncio.create_task(server.serve(listening(tmp_path / name))) for name in "ab"]
    for name in "ab":
        async with await Client.connect_unix(tmp_path / name) as client:
            assert await unary(client, name) == name
    await server.aclose()
    await asyncio.gather(*serving)


async def test_cancelling_serve_only_stops_accepting(tmp_path: Path) -> None:
    server = echo_server()
    serving = asyncio.create_task(server.serve(listening(tmp_path / "s")))
    async with await Client.connect_unix(tmp_path / "s") as client:
        await unary(client)
        serving.cancel()
        await asyncio.wait([serving])
        with pytest.raises(ConnectionRefusedError):
            await Client.connect_unix(tmp_path / "s")
        assert await unary(client, "on") == "on"
        await server.aclose()


async def test_a_closed_server_serves_nothing_more(tmp_path: Path) -> None:
    server = echo_server()
    await server.aclose()
    await server.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await server.serve(listening(tmp_path / "s"))
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(RuntimeError, match="closed"):
        await server.serve_connection(theirs)


async def test_a_connection_that_was_just_accepted_is_closed_too(tmp_path: Path) -> None:
    server = echo_server()
    serving = asyncio.create_task(server.serve(listening(tmp_path / "s")))
    client = await Client.connect_unix(tmp_path / "s")
    for _ in range(3):  # at every stage of being accepted
        await asyncio.sleep(0)
    await server.aclose()
    await serving
    await client.wait_closed()


async def test_cancelling_serve_connection_ends_it() -> None:
    gate = Gate()
    server = echo_server(gate)
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(server.serve_connection(theirs))
    async with Client.from_socket(ours) as client:
        call = asyncio.create_task(unary(client))
        await gate.entered.wait()
        serving.cancel()
        with pytest.raises(ConnectionClosed):
            await call
        await asyncio.wait([serving])
    assert gate.cancelled
    assert server.active_calls == 0


async def test_only_stream_sockets_are_served() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, pytest.raises(ValueError, match=r"[Ss]tream"):
        await echo_server().serve_connection(theirs)


async def test_closing_waits_for_running_calls_and_refuses_new_ones(connect: Connect) -> None:
    gate = Gate()
    server = echo_server(gate)
    async with connect(server) as peer:
        await peer.send(request(1, "Unary", text("x")))
        await gate.entered.wait()
        closing = asyncio.create_task(server.aclose(grace_s=10))
        await asyncio.sleep(0)
        await peer.send(request(3, "Unary"))
        assert await peer.frame() == failure(3, 14, "server is closing")
        gate.go.set()
        assert (await peer.frame()).data.endswith(b"x")
        assert await peer.at_end()
        await closing
    assert not gate.cancelled


async def test_closing_cancels_what_outlasts_the_grace(connect: Connect) -> None:
    gate = Gate()
    server = echo_server(gate)
    async with connect(server) as peer:
        await peer.send(request(1, "Unary"))
        await gate.entered.wait()
        await server.aclose(grace_s=0.02)
        assert gate.cancelled
        assert await peer.frame() == failure(1, 1, "call was cancelled by the server")
        assert await peer.at_end()
    assert server.active_calls == 0


async def test_closing_does_not_wait_for_an_idle_connection(connect: Connect) -> None:
    server = echo_server()
    async with connect(server) as peer:
        await peer.send(request(1, "Unary"))
        await peer.frame()
        async with asyncio.timeout(5):
            await server.aclose(grace_s=1000)
        assert await peer.at_end()


async def test_closing_does_not_wait_for_a_client_that_does_not_read(connect: Connect) -> None:
    async def huge(message: StringValue, call: Call) -> StringValue:
        return StringValue(value="x" * 3_000_000)

    server = echo_server(huge)
    async with connect(server) as peer:
        await peer.send(request(1, "Unary"))
        await peer.exactly(1)
        async with asyncio.timeout(5):
            await server.aclose(grace_s=0.05)


async def test_the_sockets_of_finished_connections_are_closed(tmp_path: Path) -> None:
    server = echo_server()
    serving = asyncio.create_task(server.serve(listening(tmp_path / "s")))
    await asyncio.sleep(0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        async with await Client.connect_unix(tmp_path / "s") as client:
            await unary(client)
    async with await Client.connect_unix(tmp_path / "s") as client:
        await unary(client)  # by now the server has seen the end of the others
        assert len(os.listdir("/proc/self/fd")) == before + 2
    await server.aclose()
    await serving


class FailingListener(socket.socket):
    """Fails as often as told before it accepts anything."""

    def __init__(self, path: Path, *errors: int) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self.bind(str(path))
        self.listen()
        self.errors = list(errors)
        self.attempts = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.attempts += 1
        if self.errors:
            code = self.errors.pop(0)
            raise OSError(code, os.strerror(code))
        return super().accept()


async def test_accepting_goes_on_when_descriptors_are_free_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listener = FailingListener(tmp_path / "s", errno.EMFILE, errno.ENFILE)
    accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
    acceptor = Acceptor(listener, accepted.put_nowait, retry_s=0.05)
    running = asyncio.create_task(acceptor.run())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        (await accepted.get()).close()
    # Two failures, one success, one look at the empty backlog: no spinning in between.
    assert listener.attempts == 4
    assert len(caplog.records) == 2
    assert "Too many open files" in caplog.text
    acceptor.stop()
    await running


async def test_stopping_while_waiting_for_descriptors(tmp_path: Path) -> None:
    listener = FailingListener(tmp_path / "s", *[errno.EMFILE] * 1000)
    acceptor = Acceptor(listener, lambda _: None, retry_s=1000)
    running = asyncio.create_task(acceptor.run())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        while listener.attempts == 0:
            await asyncio.sleep(0)
        acceptor.stop()
        acceptor.stop()
        await running
    assert listener.attempts == 1


async def test_a_connection_that_is_gone_before_it_is_accepted(tmp_path: Path) -> None:
    listener = FailingListener(tmp_path / "s", errno.ECONNABORTED)
    server = echo_server()
    serving = asyncio.create_task(server.serve(listener))
    async with await Client.connect_unix(tmp_path / "s") as client:
        assert await unary(client) == "hi"
    await server.aclose()
    await serving


async def test_a_listener_that_fails_for_good(tmp_path: Path) -> None:
    listener = FailingListener(tmp_path / "s", errno.EINVAL)
    serving = asyncio.create_task(echo_server().serve(listener))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        with pytest.raises(OSError, match="Invalid argument"):
            await serving
    assert listener.fileno() == -1


async def test_sockets_of_the_vsock_family() -> None:
    """asyncio must not look into addresses of a family that it does not know."""
    pair = [socket.socket(socket.AF_VSOCK, fileno=end.detach()) for end in socket.socketpair()]
    assert {end.family for end in pair} == {socket.AF_VSOCK}
    server = echo_server()
    serving = asyncio.create_task(server.serve_connection(pair[0]))
    async with Client.from_socket(pair[1]) as client:
        assert await unary(client) == "hi"
    await serving


async def test_a_client_whose_socket_was_closed_behind_its_back() -> None:
    ours, theirs = socket.socketpair()
    client = Client.from_socket(ours)
    ours.close()
    with pytest.raises(ConnectionClosed) as caught:
        await unary(client)
    assert isinstance(caught.value.__cause__, OSError)
    theirs.close()


async def test_closing_a_client_before_it_is_open() -> None:
    ours, theirs = socket.socketpair()
    client = Client.from_socket(ours)
    await client.aclose()
    assert client.closed
    assert theirs.recv(1) == b""
    theirs.close()


async def test_errors_while_closing_reach_the_caller() -> None:
    gate = Gate()
    server = echo_server(gate)
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(server.serve_connection(theirs))
    async with Client.from_socket(ours) as client:
        call = asyncio.create_task(unary(client))
        await gate.entered.wait()
        await server.aclose()
        with pytest.raises(RpcError, match="cancelled by the server") as caught:
            await call
        assert caught.value.code is Code.CANCELLED
    await serving
