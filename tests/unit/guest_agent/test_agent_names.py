"""The guest's end of the pod's name server: questions by UDP and TCP, their answers, and how many there may be."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import pytest

from guest_agent import names
from guest_agent.log import Log
from guest_agent.names import NameServer
from tests.support.name_server import answer_to, question

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HERE = "127.0.0.1"


@pytest.fixture
async def server() -> AsyncIterator[NameServer]:
    found = NameServer(Log("info"))
    found.listen(HERE, 0)
    found.listen(HERE, 0)
    yield found
    found.close()


def asker(server: NameServer) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.connect((HERE, server.port))
    return sock


async def answer_all(server: NameServer) -> list[bool]:
    """Answer what is there, once there is something; returns what came by TCP."""
    found = await server.next(wait=True)
    for number, _, message in found:
        server.answer(number, answer_to(message))
    return [by_tcp for _, by_tcp, _ in found]


async def test_by_udp(server: NameServer) -> None:
    loop = asyncio.get_running_loop()
    assert await server.next(wait=False) == []
    with asker(server) as first, asker(server) as second:
        first.send(question(1))
        second.send(question(2))
        seen = 0
        while seen < 2:
            answered = await answer_all(server)
            assert answered == [False] * len(answered)
            seen += len(answered)
        assert await loop.sock_recv(first, 1000) == answer_to(question(1))
        assert await loop.sock_recv(second, 1000) == answer_to(question(2))


async def test_by_tcp(server: NameServer) -> None:
    reader, writer = await asyncio.open_connection(HERE, server.port)
    for number in (1, 2):
        asked = question(number)
        writer.write(len(asked).to_bytes(2, "big") + asked)
        assert await answer_all(server) == [True]
        length = int.from_bytes(await reader.readexactly(2), "big")
        assert await reader.readexactly(length) == answer_to(asked)
    # Half a question, and then nothing more.
    writer.write(b"\xff\xffabc")
    writer.write_eof()
    assert await reader.read() == b""
    writer.close()


async def test_no_answer(server: NameServer) -> None:
    """Who asked by TCP is told by the connection's end; by UDP nobody is."""
    reader, writer = await asyncio.open_connection(HERE, server.port)
    writer.write(b"\0\1x")
    ((number, _, message),) = await server.next(wait=True)
    assert message == b"x"
    server.answer(number, b"")
    assert await reader.read() == b""
    writer.close()
    with asker(server) as udp:
        udp.send(b"y")
        ((number, _, _),) = await server.next(wait=True)
        server.answer(number, b"")
        server.answer(number, b"again")
        server.answer(number + 99, b"never asked")
        udp.send(question(3))
        await answer_all(server)
        assert await asyncio.get_running_loop().sock_recv(udp, 1000) == answer_to(question(3))


async def test_the_oldest_question_is_forgotten_for_one_too_many(
    server: NameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "MAX_WAITING", 3)
    with asker(server) as udp:
        for number in range(5):
            udp.send(bytes((number,)))
        found: list[bytes] = []
        while not found or found[-1] != b"\4":
            found += [message for _, _, message in await server.next(wait=True)]
        assert len(server._answers) == 3


async def test_connections_are_limited(server: NameServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MAX_CONNECTIONS", 1)
    _, first = await asyncio.open_connection(HERE, server.port)
    first.write(b"\0\1x")
    assert len(await server.next(wait=True)) == 1
    reader, second = await asyncio.open_connection(HERE, server.port)
    assert await reader.read() == b""
    for writer in (first, second):
        writer.close()


async def test_an_address_that_is_taken(server: NameServer) -> None:
    with pytest.raises(OSError, match="in use"):
        NameServer(Log("info")).listen(HERE, server.port)
