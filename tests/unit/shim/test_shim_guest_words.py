"""What a guest may say, and what the shim makes of it."""

from __future__ import annotations

import asyncio
import os
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from agent_proto.gen import agent_pb2
from shim import agent_log, log
from shim.guest import GuestProcess
from ttrpc import RpcError


class FakeAgent:
    """Takes a part of every write: `takes` bytes."""

    def __init__(self, takes: int) -> None:
        self.takes = takes
        self.writes: list[bytes] = []

    async def write_stdin(self, request: agent_pb2.WriteStreamRequest) -> agent_pb2.WriteStreamResponse:
        self.writes.append(request.data)
        assert len(self.writes) < 10
        return agent_pb2.WriteStreamResponse(len=self.takes)


@pytest.mark.parametrize(
    ("takes", "writes"),
    [(2, [b"abcd", b"cd"]), (4, [b"abcd"]), (1000, [b"abcd"])],
    ids=["half", "all", "too many"],
)
async def test_input_is_written_to_its_end(takes: int, writes: list[bytes]) -> None:
    agent = FakeAgent(takes)
    await GuestProcess(cast("Any", agent), "c").write_stdin(b"abcd")
    assert agent.writes == writes


async def test_input_that_is_not_taken() -> None:
    agent = FakeAgent(0)
    with pytest.raises(RpcError, match="took none"):
        await GuestProcess(cast("Any", agent), "c").write_stdin(b"abcd")
    assert agent.writes == [b"abcd"]


async def log_of(data: bytes, *least: int) -> list[str]:
    """The texts that the agent's log stream leaves in ours."""
    ours, guests = socket.socketpair()
    ours.setblocking(False)

    async def connect(port: int) -> socket.socket:
        return ours

    async def feed() -> None:
        guests.setblocking(False)
        with guests:
            await asyncio.get_running_loop().sock_sendall(guests, data)

    with capture_logs() as logs:
        feeding = asyncio.create_task(feed())
        await agent_log.forward(
            cast("Any", SimpleNamespace(vsock=SimpleNamespace(connect=connect))), 1025, *least
        )
        await feeding
    return [entry["text"] for entry in logs if entry["event"] == "guest_log"]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"level": "INFO", "msg": "hello"}', "hello"),
        (b"no json", "no json"),
        (b"[]", "[]"),
        (b"[" * 15_000, "[" * 15_000),
        (b"\xff", "\ufffd"),
        (b"1" * 5000, "1" * 5000),
    ],
    ids=["good", "text", "list", "deep", "bytes", "digits"],
)
async def test_agents_log_line(line: bytes, text: str) -> None:
    assert await log_of(line + b"\n" + b"next\n") == [text, "next"]


async def test_agents_log_lines_below_the_level_are_left_out() -> None:
    lines = b"".join(
        b'{"level": "%s", "msg": "%s"}\n' % (2 * (level,)) for level in (b"DEBG", b"INFO", b"WARN", b"CRIT")
    )
    assert await log_of(lines, log.number_of("warn")) == ["WARN", "CRIT"]
    assert await log_of(lines, log.number_of("critical")) == ["CRIT"]
    assert len(await log_of(lines, log.number_of("trace"))) == 4


async def test_agents_log_line_over_the_limit_comes_in_pieces() -> None:
    data = b"x" * 100_000
    pieces = await log_of(data + b"\nnext\n")
    assert ("".join(pieces[:-1]), pieces[-1]) == ("x" * 100_000, "next")
    assert max(map(len, pieces)) <= 16 * 1024


def test_control_characters_do_not_reach_the_log() -> None:
    read, write = os.pipe()
    try:
        log._FdLogger(write).msg("a\x1b[31m\r\nb\x9b\u20ac")
        assert os.read(read, 100) == b"a\\x1b[31m\\x0d\\x0ab\\x9b\xe2\x82\xac\n"
    finally:
        os.close(read)
        os.close(write)
