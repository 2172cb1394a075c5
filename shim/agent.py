"""Reaching the guest's agent: connect as soon as it listens, without polling, and as patient as the guest is busy."""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Awaitable

    from agent_proto.client import AgentClient
    from config import Agent
    from hypervisor.qemu.machine import Machine
    from hypervisor.spec import VsockKind

T = TypeVar("T")
log = structlog.get_logger()

# Port of the host that our agent calls when it is ready, where each guest has ports of its own.
READY_PORT = 1024
_FIRST_OF_MANY = 1 << 30
_READY_LINE_LIMIT = 512
_READY_LINE_LIMIT_S = 10.0
_LONGEST_PAUSE_S = 0.5
_WHAT = "the guest's agent cannot be reached"
# A machine that goes down breaks the agent's connection a moment before QEMU has ended.
_LAST_WORDS_S = 1.0


def ready_port(vsock: VsockKind) -> int:
    """The port of the host that our agent calls when it is ready; a stock agent does not know of it.

    The kernel's transport has one space of ports for all guests of the host, in which each needs another one.
    """
    if vsock == "user":
        return READY_PORT
    return _FIRST_OF_MANY + int.from_bytes(os.urandom(4), "big") // 4


class ReadySignal:
    """Our agent's call when it listens: the host then connects at once instead of trying again and again."""

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.line = b""
        self.came_at: float | None = None
        self._reading: asyncio.Task[None] | None = None

    def on_connection(self, sock: socket.socket) -> None:
        """Take the guest's call; the line that it sends, its boot times, is read by the way."""
        self.event.set()
        if self._reading is None:
            self.came_at = time.monotonic()
            self._reading = asyncio.create_task(self._read(sock), name="ready signal")
        else:
            sock.close()  # it has called before

    async def _read(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with sock:
            try:
                async with asyncio.timeout(_READY_LINE_LIMIT_S):
                    while len(self.line) < _READY_LINE_LIMIT:
                        data = await loop.sock_recv(sock, _READY_LINE_LIMIT)
                        if not data:
                            break
                        self.line += data
            except (OSError, TimeoutError) as err:
                log.debug("ready_line_cut_short", error=str(err))

    def boot_times(self) -> dict[str, float]:
        """Seconds of the guest's clock: when its init started and when its agent listened; empty when not told."""
        try:
            times = json.loads(self.line)
            return {name: float(times[name]) for name in ("init_s", "ready_s")}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return {}  # a guest may say anything


@asynccontextmanager
async def connected(
    machine: Machine, config: Agent, ready: ReadySignal, patience_s: float
) -> AsyncIterator[AgentClient]:
    """A client of the machine's agent.

    Raises:
        BootFailed: the machine ended, or its guest showed no sign of life for `patience_s`; quotes its console.
    """
    from agent_proto.client import AgentClient
    from ttrpc import Client

    if config.server_addr:
        try:
            client = await Client.connect_unix(config.server_addr.removeprefix("unix:"))
        except OSError as err:
            raise machine.failure(_WHAT, f"{config.server_addr}: {err.strerror}") from err
    else:
        client = Client.from_socket(await _connect(machine, config, ready, patience_s))
    try:
        yield AgentClient(
            client,
            timeout_s=config.create_container_timeout,
            create_container_timeout_s=config.create_container_timeout,
        )
    finally:
        await client.aclose()


async def answered(call: Awaitable[T], machine: Machine) -> T:
    """Wait for the agent's answer; a connection that breaks because the machine ends is told by its reason.

    Raises:
        BootFailed: the machine ended; quotes its last words.
        RpcError: the agent refused.
    """
    from ttrpc import ConnectionClosed

    answer = asyncio.ensure_future(call)
    ends: list[asyncio.Future[Any]] = [answer, machine.exited]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if answer.done() and not isinstance(answer.exception(), ConnectionClosed):
            return answer.result()
        await asyncio.wait([machine.exited], timeout=_LAST_WORDS_S)
        raise machine.failure("the guest's agent is gone", "it closed the connection")
    finally:
        answer.cancel()


async def _connect(machine: Machine, config: Agent, ready: ReadySignal, patience_s: float) -> socket.socket:
    """A stream to the agent's port.

    The device waits until the guest's driver is up. A guest that is up but does not listen yet refuses; then the
    ready signal, or for a stock agent a growing pause, says when to try again.
    """
    pause_s = config.dial_timeout_ms / 1000
    while True:
        attempt = asyncio.create_task(machine.vsock.connect(config.server_port))
        try:
            await _while_alive(machine, attempt, patience_s)
        except BaseException:
            # It may have come to an end at the same moment, and nobody takes what it has got.
            attempt.cancel()
            attempt.add_done_callback(_close_unwanted)
            raise
        try:
            return attempt.result()
        except (ConnectionRefusedError, ConnectionResetError) as err:
            log.debug("agent_refused", error=str(err), retry_s=pause_s)
        pause = asyncio.create_task(asyncio.wait_for(ready.event.wait(), pause_s))
        try:
            await _while_alive(machine, pause, patience_s)
            pause.exception()  # a time-out only means that the pause is over
        finally:
            pause.cancel()
        ready.event.clear()
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


def _close_unwanted(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


async def _while_alive(machine: Machine, task: asyncio.Task[T], patience_s: float) -> None:
    """Wait for `task` as long as the machine runs and its guest makes progress.

    Raises:
        BootFailed: the machine ended, or no sign of life for `patience_s`.
    """
    loop = asyncio.get_running_loop()
    while not task.done():
        left_s = machine.last_progress() + patience_s - loop.time()
        if left_s <= 0:
            raise machine.failure(_WHAT, f"the guest has shown no sign of life for {patience_s:g} s")
        ends: set[asyncio.Future[Any]] = {task, machine.exited}
        await asyncio.wait(ends, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if machine.exited.done() and not task.done():
            raise machine.failure(_WHAT)
