"""Connecting to the agent: at once when it calls, patiently while the guest shows life, never after its end."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any, cast

import pytest
from google.protobuf.empty_pb2 import Empty
from msgspec.structs import replace

from agent_proto import services
from agent_proto.gen import agent_pb2
from config import Agent
from hypervisor.errors import BootFailed
from hypervisor.process import ProcessExit
from shim.agent import READY_PORT, ReadySignal, connected, ready_port
from ttrpc import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor.qemu.machine import Machine

# Longer than a test may take: who waits for this pause fails.
LONG_PAUSE = replace(Agent(), dial_timeout_ms=60_000)
NO_PAUSE = replace(Agent(), dial_timeout_ms=1)


class FakeMachine:
    """A machine whose vsock device answers as the test says: one answer for each attempt, the last one repeated."""

    def __init__(self, *answers: Callable[[], socket.socket]) -> None:
        self.exited: asyncio.Future[ProcessExit] = asyncio.get_running_loop().create_future()
        self.progress = asyncio.get_running_loop().time()
        self.vsock = self
        self.attempts: list[int] = []
        self.attempted = asyncio.Event()
        self._answers = list(answers)

    async def connect(self, port: int) -> socket.socket:
        self.attempts.append(port)
        self.attempted.set()
        if not self._answers:
            await asyncio.Event().wait()
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        return answer()

    def last_progress(self) -> float:
        return self.progress

    def failure(self, what: str, why: str = "") -> BootFailed:
        ended = self.exited.result() if self.exited.done() else None
        return BootFailed(what, str(ended or why), "remedy", exit=ended)


def refuse() -> socket.socket:
    raise ConnectionRefusedError("nobody listens")


@pytest.fixture
async def agent_end() -> Any:
    """A server's end that answers one method, as a factory of connected sockets."""
    server = Server()
    tasks: list[asyncio.Task[None]] = []

    async def start_container(request: agent_pb2.StartContainerRequest, call: object) -> Empty:
        return Empty()

    server.register(services.AGENT, {"StartContainer": start_container})

    def connect() -> socket.socket:
        ours, theirs = socket.socketpair()
        tasks.append(asyncio.create_task(server.serve_connection(theirs)))
        return ours

    yield connect
    await server.aclose()
    await asyncio.gather(*tasks)


async def use(machine: FakeMachine, config: Agent, ready: ReadySignal, patience_s: float = 60) -> None:
    async with connected(cast("Machine", machine), config, ready, patience_s) as agent:
        await agent.start_container(agent_pb2.StartContainerRequest(container_id="c"))


def call_of_the_guest(ready: ReadySignal, line: bytes = b"") -> None:
    """The guest connects to the ready port, writes its line and closes."""
    host, guest = socket.socketpair()
    host.setblocking(False)
    guest.sendall(line)
    guest.close()
    ready.on_connection(host)


async def tasks_ended() -> None:
    """All other tasks are ending: whoever was forgotten waits too long."""
    async with asyncio.timeout(5):
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


def test_guests_that_share_the_hosts_ports_call_different_ones() -> None:
    assert {ready_port("user") for _ in range(2)} == {READY_PORT}
    ports = {ready_port("vhost") for _ in range(50)}
    assert len(ports) == 50
    assert all(READY_PORT < port < 1 << 31 for port in ports)


async def test_connected_at_once(agent_end: Any) -> None:
    machine = FakeMachine(agent_end)
    await use(machine, LONG_PAUSE, ReadySignal())
    assert machine.attempts == [Agent().server_port]


async def test_ready_signal_ends_the_pause(agent_end: Any) -> None:
    machine, ready = FakeMachine(refuse, agent_end), ReadySignal()
    using = asyncio.create_task(use(machine, LONG_PAUSE, ready))
    await machine.attempted.wait()
    call_of_the_guest(ready)
    await using
    assert len(machine.attempts) == 2


async def test_ready_signal_before_the_refusal(agent_end: Any) -> None:
    """The agent may have begun to listen while our attempt was on its way."""
    machine, ready = FakeMachine(refuse, agent_end), ReadySignal()
    call_of_the_guest(ready)
    await use(machine, LONG_PAUSE, ready)
    assert len(machine.attempts) == 2


async def test_stock_agent_is_tried_again_after_pauses(agent_end: Any) -> None:
    machine = FakeMachine(refuse, refuse, refuse, agent_end)
    await use(machine, NO_PAUSE, ReadySignal())
    assert len(machine.attempts) == 4


@pytest.mark.parametrize("answers", [[], [refuse]], ids=["in an attempt", "in a pause"])
async def test_end_of_the_machine(answers: list[Any]) -> None:
    machine = FakeMachine(*answers)
    using = asyncio.create_task(use(machine, LONG_PAUSE, ReadySignal()))
    await machine.attempted.wait()
    machine.exited.set_result(ProcessExit(None, 9))
    with pytest.raises(BootFailed, match="agent cannot be reached: killed by SIGKILL"):
        await using
    await tasks_ended()


async def test_silence() -> None:
    machine = FakeMachine()
    with pytest.raises(BootFailed, match=r"no sign of life for 0\.05 s"):
        await use(machine, LONG_PAUSE, ReadySignal(), patience_s=0.05)


async def test_a_guest_that_makes_progress_is_waited_for(agent_end: Any) -> None:
    """Its silence counts from the last sign of life, not from the start."""
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()

    class SlowMachine(FakeMachine):
        def last_progress(self) -> float:
            return loop.time()  # it talks all the time

        async def connect(self, port: int) -> socket.socket:
            await gate.wait()
            return await super().connect(port)

    using = asyncio.create_task(use(SlowMachine(agent_end), LONG_PAUSE, ReadySignal(), patience_s=0.02))
    loop.call_later(0.1, gate.set)
    await using


async def test_cancelled_in_a_pause() -> None:
    machine = FakeMachine(refuse)
    using = asyncio.create_task(use(machine, LONG_PAUSE, ReadySignal()))
    await machine.attempted.wait()
    using.cancel()
    await asyncio.gather(using, return_exceptions=True)
    await tasks_ended()


async def test_unix_address_without_an_agent() -> None:
    config = replace(Agent(), server_addr="unix:/no/such/agent.sock")
    with pytest.raises(BootFailed, match=r"unix:/no/such/agent\.sock: No such file"):
        await use(FakeMachine(), config, ReadySignal())


@pytest.mark.parametrize(
    ("line", "times"),
    [
        (b'{"init_s": 0.5, "ready_s": 1.25}\n', {"init_s": 0.5, "ready_s": 1.25}),
        (b'{"init_s": 1, "ready_s": 2, "more": 3}\n', {"init_s": 1.0, "ready_s": 2.0}),
        (b"", {}),
        (b"{", {}),
        (b"[]", {}),
        (b"null", {}),
        (b'{"init_s": "x", "ready_s": 1}', {}),
        (b'{"init_s": 1}', {}),
        (b"\xff\xfe", {}),
        (b"x" * 100_000, {}),
        (b"[" * 1000, {}),
        (b'{"init_s": 1' + b"0" * 400 + b', "ready_s": 1}', {}),
    ],
    ids=["good", "more", "empty", "cut", "list", "null", "word", "missing", "bytes", "long", "deep", "huge"],
)
async def test_ready_line(line: bytes, times: dict[str, float]) -> None:
    """Whatever the guest writes, it is told that it has called."""
    ready = ReadySignal()
    before = asyncio.all_tasks()
    call_of_the_guest(ready, line)
    assert ready.event.is_set()
    await asyncio.gather(*(asyncio.all_tasks() - before))
    assert ready.boot_times() == times


async def test_second_call_is_ignored() -> None:
    ready = ReadySignal()
    call_of_the_guest(ready, b'{"init_s": 1, "ready_s": 2}')
    call_of_the_guest(ready, b'{"init_s": 3, "ready_s": 4}')
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))
    assert ready.boot_times() == {"init_s": 1.0, "ready_s": 2.0}


async def test_connection_that_comes_with_the_cancellation_is_closed() -> None:
    ours, theirs = socket.socketpair()

    def connect() -> socket.socket:
        user.cancel()
        return ours

    user = asyncio.create_task(use(FakeMachine(connect), LONG_PAUSE, ReadySignal()))
    with theirs, pytest.raises(asyncio.CancelledError):
        await user
    await tasks_ended()
    await asyncio.sleep(0)  # the callbacks of what has just ended
    assert ours.fileno() == -1
