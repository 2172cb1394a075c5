"""Docker's name server for guests: what a guest asks is asked in the pod's namespace, of a real server there."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent_proto.gen.kata_py_agent_pb2 import NameQuestion, NextNamesResponse
from shim import names
from tests.support.name_server import answer_to, question, serving
from tests.support.namespaces import in_network_namespace
from ttrpc import Code, RpcError

OWN = Path("/proc/self/ns/net")


class Agent:
    """A guest's agent that has questions; `answers` are by their numbers."""

    def __init__(self, *questions: list[NameQuestion]) -> None:
        self.answers: dict[int, bytes] = {}
        self.asked: list[Any] = []
        self._questions = list(questions)
        self._news = asyncio.Event()

    async def next_names(self, request: Any) -> NextNamesResponse:
        self.asked.append(request)
        if self._questions:
            return NextNamesResponse(questions=self._questions.pop(0))
        await self._news.wait()
        raise RpcError(Code.UNAVAILABLE, "the guest is gone")

    async def answer_name(self, request: Any) -> None:
        self.answers[request.number] = request.message
        if len(self.answers) % 2:
            raise RpcError(Code.INTERNAL, "the guest did not want it")

    def leave(self) -> None:
        self._news.set()


async def until_answered(agent: Any, count: int) -> None:
    serving_names = asyncio.create_task(names.serve(agent, OWN))
    async with asyncio.timeout(60):
        while len(agent.answers) < count:
            await asyncio.sleep(0.01)
        agent.leave()
        await serving_names


@pytest.mark.parametrize(
    ("lines", "asked"),
    [
        (["nameserver 127.0.0.11"], True),
        (["search a", "nameserver\t127.0.0.11 # Docker's"], True),
        (["nameserver 127.0.0.1"], False),
        (["# nameserver 127.0.0.11", "nameserver", ""], False),
        ([], False),
    ],
)
def test_who_asks_for_it(lines: list[str], asked: bool) -> None:
    assert names.is_asked_for(lines) is asked


def test_questions_are_answered() -> None:
    async def work() -> None:
        many = [NameQuestion(number=n, by_tcp=bool(n % 2), message=question(n)) for n in range(100)]
        agent: Any = Agent(many[:50], many[50:])
        with serving(OWN, names.ADDRESS) as asked:
            await until_answered(agent, 100)
        assert agent.answers == {n: answer_to(question(n)) for n in range(100)}
        assert (asked.count("udp"), asked.count("tcp")) == (50, 50)
        assert all(request.wait and request.address == names.ADDRESS for request in agent.asked)

    def run() -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        asyncio.run(work())

    in_network_namespace(run)


def test_no_server_there() -> None:
    """The guest is told that there is no answer, and asks on."""

    async def work() -> None:
        agent: Any = Agent(
            [
                NameQuestion(number=n, by_tcp=bool(n % 2), message=message)
                for n, message in enumerate((b"x", b"", b"y"))
            ]
        )
        await until_answered(agent, 3)
        assert agent.answers == dict.fromkeys(range(3), b"")

    in_network_namespace(lambda: asyncio.run(work()))


def test_a_question_that_is_too_long_harms_no_other() -> None:
    """No program can ask it, but an agent that is not ours can send it."""

    async def work() -> None:
        agent: Any = Agent(
            [NameQuestion(number=n, by_tcp=bool(n % 2), message=bytes(65536)) for n in range(2)],
            [NameQuestion(number=2, by_tcp=True, message=question(2))],
        )
        with serving(OWN, names.ADDRESS):
            await until_answered(agent, 3)
        assert agent.answers == {0: b"", 1: b"", 2: answer_to(question(2))}

    def run() -> None:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        asyncio.run(work())

    in_network_namespace(run)


async def test_an_agent_that_cannot() -> None:
    class Stock:
        async def next_names(self, request: Any) -> None:
            raise RpcError(Code.UNIMPLEMENTED, "unknown method")

    stock: Any = Stock()
    assert not await names.begin(stock)
    ours: Any = Agent([])
    assert await names.begin(ours)
    assert not ours.asked[0].wait
