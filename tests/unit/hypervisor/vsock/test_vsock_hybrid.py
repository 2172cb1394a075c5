"""The Unix socket through which other programs reach the guest's ports."""

from __future__ import annotations

import asyncio
import socket
import stat
from typing import TYPE_CHECKING

import pytest

from hypervisor.vsock.hybrid import HybridSocket
from tests.unit.hypervisor.vsock.driver import RESPONSE, RST, RW, SHUTDOWN, Guest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hypervisor.vsock.user import UserVsock

    Pair = tuple[UserVsock, Guest]


@pytest.fixture
async def path(booted: Pair, tmp_path: Path) -> AsyncIterator[Path]:
    path = tmp_path / "vsock.sock"
    hybrid = HybridSocket(booted[0], path, line_limit_s=0.2)
    yield path
    await hybrid.aclose()
    await hybrid.aclose()
    assert not path.exists()


async def client(path: Path, line: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, str(path))
    sock.send(line)
    return sock


async def receive(sock: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(sock, 1 << 16)


async def hung_up(sock: socket.socket) -> bool:
    """Whether the other end closes without a word; a reset, when it had not read all of ours."""
    try:
        return await receive(sock) == b""
    except ConnectionResetError:
        return True


async def test_only_the_owner_may_connect(path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_ISSOCK(path.stat().st_mode)


@pytest.mark.parametrize("word", [b"CONNECT", b"connect", b"Connect"])
async def test_connect(booted: Pair, path: Path, word: bytes) -> None:
    _, guest = booted
    sock = await client(path, word + b" 1024\nfirst bytes")
    request = await guest.accept()
    assert request.dst_port == 1024
    assert await receive(sock) == b"OK %d\n" % request.src_port
    assert (await guest.packet(RW)).payload == b"first bytes"
    guest.send(RW, 1024, request.src_port, b"answer")
    assert await receive(sock) == b"answer"
    sock.close()
    assert (await guest.packet(SHUTDOWN)).flags == 3


async def test_bytes_right_behind_the_response_come_after_the_ok(booted: Pair, path: Path) -> None:
    _, guest = booted
    sock = await client(path, b"CONNECT 1024\n")
    request = await guest.packet()
    guest.send(RESPONSE, 1024, request.src_port, kick=False)
    guest.send(RW, 1024, request.src_port, b"greetings", kick=False)
    guest.send(SHUTDOWN, 1024, request.src_port, flags=3)
    await guest.packet(RST)
    data = b""
    while more := await receive(sock):
        data += more
    assert data == b"OK %d\ngreetings" % request.src_port
    sock.close()


async def test_our_greeting_takes_none_of_the_guests_credit(booted: Pair, path: Path) -> None:
    _, guest = booted
    sock = await client(path, b"CONNECT 1024\n")
    request = await guest.accept()
    await receive(sock)
    sock.send(b"x")
    assert (await guest.packet(RW)).fwd_cnt == 0
    guest.send(RW, 1024, request.src_port, b"12345")
    await receive(sock)
    sock.send(b"x")
    assert (await guest.packet(RW)).fwd_cnt == 5
    sock.close()


async def test_refused(booted: Pair, path: Path) -> None:
    device, guest = booted
    sock = await client(path, b"CONNECT 1024\n")
    request = await guest.packet()
    guest.send(RST, 1024, request.src_port)
    assert await receive(sock) == b""
    assert device.stats.flows == 0
    sock.close()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"CONNECT\n",
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT 1 2\n",
        b"CONNECT 4294967295\n",
        b"CONNECT \xb2\n",
        b"GET / HTTP/1.1\r\n",
        b"CONNECT 1" + b" " * 32,
        b"CONNECT 1024",  # and then nothing, until the time is over
    ],
)
async def test_bad_line_is_hung_up_on(booted: Pair, path: Path, line: bytes) -> None:
    device, guest = booted
    sock = await client(path, line)
    assert await hung_up(sock)
    assert device.stats.flows == 0
    assert not guest.packets
    sock.close()


async def test_client_that_leaves_early(booted: Pair, path: Path) -> None:
    device, _ = booted
    (await client(path, b"CONN")).close()
    sock = await client(path, b"bad\n")  # handled after it
    assert await receive(sock) == b""
    assert device.stats.flows == 0
    sock.close()


async def test_handshakes_are_capped(booted: Pair, path: Path) -> None:
    socks = [await client(path, b"CONNECT 1024\n") for _ in range(64)]
    late = await client(path, b"CONNECT 1024\n")
    assert await hung_up(late)
    for sock in [*socks, late]:
        sock.close()


async def test_close_ends_handshakes_but_not_streams(booted: Pair, tmp_path: Path) -> None:
    device, guest = booted
    path = tmp_path / "other.sock"
    hybrid = HybridSocket(device, path)
    stream = await client(path, b"CONNECT 1024\n")
    request = await guest.accept()
    await receive(stream)
    asked = await client(path, b"CONNECT 9\n")
    await guest.packet()
    silent = await client(path, b"")
    await hybrid.aclose()
    assert not path.exists()
    assert await receive(asked) == b""
    assert await hung_up(silent)
    guest.send(RW, 1024, request.src_port, b"alive")
    assert await receive(stream) == b"alive"
    for sock in (stream, asked, silent):
        sock.close()


async def test_path_that_is_taken(booted: Pair, path: Path) -> None:
    with pytest.raises(OSError, match="in use"):
        HybridSocket(booted[0], path)
