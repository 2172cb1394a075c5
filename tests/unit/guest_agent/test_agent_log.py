from __future__ import annotations

import asyncio
import json
import os
import socket
from typing import Any

import pytest

from guest_agent import logstream
from guest_agent.log import Backlog, Log


def lines(log: Log) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.backlog.take(1 << 20).splitlines()]


def test_a_line_is_what_katas_host_side_reads() -> None:
    log = Log("debug", console_fd=None)
    log.warning("disk_full", path="/x", bytes=3)
    (line,) = lines(log)
    stamp = line.pop("ts")
    assert line == {"msg": "disk_full", "level": "WARN", "name": "kata-py-agent", "path": "/x", "bytes": 3}
    assert len(stamp) == len("2026-01-01T00:00:00.000000Z")


def test_levels() -> None:
    log = Log("warning", console_fd=None)
    for write in (log.debug, log.info, log.warning, log.error, log.critical):
        write("event")
    assert [line["level"] for line in lines(log)] == ["WARN", "ERRO", "CRIT"]


def test_only_warnings_reach_the_console() -> None:
    reading, writing = os.pipe()
    log = Log("debug", console_fd=writing)
    log.info("quiet")
    log.error("loud", why="so")
    os.close(writing)
    with open(reading) as console:
        assert console.read() == "agent: error: loud why=so\n"


def test_the_oldest_lines_are_given_up() -> None:
    backlog = Backlog(limit_bytes=10)
    for line in (b"aaaa\n", b"bbbb\n", b"cccc\n"):
        backlog.put(line)
    assert backlog.lost == 1
    assert backlog.take(100) == b"bbbb\ncccc\n"
    assert backlog.take(100) == b""


def test_a_line_larger_than_the_limit_is_kept() -> None:
    backlog = Backlog(limit_bytes=3)
    backlog.put(b"a long line\n")
    assert backlog.take(1) == b"a long line\n"


def test_lines_are_taken_whole() -> None:
    backlog = Backlog()
    backlog.put(b"1\n")
    backlog.put(b"2\n")
    assert backlog.take(1) == b"1\n"


@pytest.fixture
def listener() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0agent-log-{os.getpid()}")
    sock.listen()
    return sock


async def read_line(connection: socket.socket) -> dict[str, Any]:
    data = b""
    while not data.endswith(b"\n"):
        data += await asyncio.get_running_loop().sock_recv(connection, 1)
    line: dict[str, Any] = json.loads(data)
    return line


async def connected(address: Any) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, address)
    return sock


async def test_readers_get_what_was_kept_and_what_comes(listener: socket.socket) -> None:
    log = Log(console_fd=None)
    log.info("early")
    address = listener.getsockname()
    serving = asyncio.create_task(logstream.serve(listener, log))
    with await connected(address) as reader:
        assert (await read_line(reader))["msg"] == "early"
        log.info("later")
        assert (await read_line(reader))["msg"] == "later"
    log.info("to notice that the reader left")
    with await connected(address) as reader:
        seen = []
        while "for the second" not in seen:
            log.info("for the second")
            seen.append((await read_line(reader))["msg"])
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert listener.fileno() == -1
    assert log.backlog.wake is None


async def test_lost_lines_are_told(listener: socket.socket) -> None:
    log = Log(console_fd=None)
    log.backlog = Backlog(limit_bytes=300)
    for number in range(10):
        log.info("event", number=number)
    address = listener.getsockname()
    serving = asyncio.create_task(logstream.serve(listener, log))
    with await connected(address) as reader:
        lost = 0
        while not lost:
            line = await read_line(reader)
            lost = line.get("lines", 0)
    assert line["msg"] == "log_lines_lost"
    assert 5 <= lost <= 10
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
