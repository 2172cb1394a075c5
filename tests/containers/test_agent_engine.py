"""The agent's adapter of the engine on this host: in an event loop, with a reaper that collects every child."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest_agent import errors
from guest_agent.engine import Engine
from guest_agent.log import Log
from guest_agent.reaper import Reaper
from tests.support.containers import Containers, spec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from guest_agent.engine import Started

ENVIRONMENT = {"cwd": "/", "env": ["PATH=/bin"]}


class Agent:
    """What the agent has around its engine. There is one in a process, since its reaper collects every child."""

    def __init__(self, containers: Containers) -> None:
        self.reaper = Reaper()
        self.log = Log(console_fd=None)
        self.engine = Engine(self.reaper, self.log, state_dir=str(containers.folder / "state"))
        self._containers = containers

    async def create(self, document: dict[str, Any]) -> tuple[str, Started]:
        container_id, bundle = self._containers.bundle(document)
        terminal = document["process"]["terminal"]
        return container_id, await self.engine.create(
            container_id, str(bundle), terminal=terminal, pipe_size=0
        )

    async def running(self) -> tuple[str, Started]:
        container_id, started = await self.create(spec("sleep", "1000"))
        await self.engine.start(container_id)
        return container_id, started

    async def exec(self, container_id: str, *args: str, terminal: bool = False) -> tuple[int, bytes]:
        process = {"args": list(args), "terminal": terminal, **ENVIRONMENT}
        started = await self.engine.exec(container_id, process, terminal=terminal, pipe_size=0)
        return await ended(started)

    async def remove(self, container_id: str, started: Started) -> None:
        await self.engine.delete_with_hooks(container_id)
        await started.exited
        started.stdio.close()


async def ended(started: Started) -> tuple[int, bytes]:
    """Exit code, and what was written to the standard output."""
    assert started.stdio.stdout is not None
    text = b""
    while piece := await started.stdio.stdout.read(0):
        text += piece
    code = await started.exited
    started.stdio.close()
    return code, text


@pytest.fixture
async def agent(containers: Containers) -> AsyncIterator[Agent]:
    made = Agent(containers)
    made.reaper.start()
    yield made
    made.reaper.stop()


async def test_a_life(agent: Agent) -> None:
    container_id, started = await agent.create(spec("sh", "-c", "echo out; exit 3"))
    assert not started.exited.done()
    await agent.engine.start(container_id)
    assert await ended(started) == (3, b"out\n")
    with pytest.raises(errors.StateConflict):
        await agent.engine.start(container_id)
    await agent.remove(container_id, started)
    agent.engine.forget(container_id)  # harmless


async def test_execs(agent: Agent) -> None:
    container_id, started = await agent.running()
    assert await agent.exec(container_id, "sh", "-c", "echo $PATH; exit 7") == (7, b"/bin\n")
    assert await agent.exec(container_id, "tty", terminal=True) == (0, b"/dev/pts/0\r\n")
    results = await asyncio.gather(
        *(agent.exec(container_id, "sh", "-c", f"exit {code}") for code in range(20))
    )
    assert [code for code, _ in results] == list(range(20))
    await agent.remove(container_id, started)


async def test_the_loop_goes_on_while_the_engine_waits(agent: Agent) -> None:
    document = spec("true")
    document["hooks"] = {"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}]}
    making = asyncio.ensure_future(agent.create(document))
    turns = 0
    while not making.done():
        await asyncio.wait([making], timeout=0.01)
        turns += 1
    with pytest.raises(errors.EngineFailed, match="createRuntime hook /bin/sleep took longer than its 1 s"):
        await making
    assert turns > 1


async def test_how_hooks_end_is_known_although_the_reaper_collects_them(agent: Agent) -> None:
    document = spec("true")
    document["hooks"] = {"prestart": [{"path": "/bin/sh", "args": ["sh", "-c", "echo why; exit 5"]}]}
    with pytest.raises(errors.EngineFailed, match="prestart hook /bin/sh ended with status 5: why"):
        await agent.create(document)
    document = spec("true")
    document["hooks"] = {"poststop": [{"path": "/bin/sh", "args": ["sh", "-c", "kill -9 $$"]}]}
    container_id, started = await agent.create(document)
    await agent.remove(container_id, started)
    assert b"poststop hook /bin/sh ended with status 137" in agent.log.backlog.take(1 << 16)


@pytest.mark.parametrize(
    ("args", "kind", "problem"),
    [
        (["no-such"], errors.InvalidRequest, 'exec: "no-such": executable file not found in $PATH'),
        (["/etc/passwd"], errors.EngineFailed, 'exec: "/etc/passwd": permission denied'),
    ],
)
async def test_what_cannot_be_executed(
    agent: Agent, args: list[str], kind: type[Exception], problem: str
) -> None:
    with pytest.raises(kind) as caught:
        await agent.create(spec(*args))
    assert str(caught.value) == problem
    container_id, started = await agent.running()
    with pytest.raises(kind) as caught:
        await agent.exec(container_id, *args)
    assert str(caught.value) == problem
    await agent.remove(container_id, started)


async def test_nothing_of_the_agent_is_open_in_a_container(agent: Agent) -> None:
    reading, writing = os.pipe()
    os.set_inheritable(reading, True)
    container_id, started = await agent.create(spec("sh", "-c", "ls /proc/self/fd | wc -l"))
    await agent.engine.start(container_id)
    # The three streams, and the directory that is listed.
    assert await ended(started) == (0, b"4\n")
    os.close(reading)
    os.close(writing)
    await agent.remove(container_id, started)


async def test_limits_can_be_changed(agent: Agent) -> None:
    container_id, started = await agent.running()
    with pytest.raises(errors.InvalidRequest, match=r"resources\.cpu\.cpus"):
        await agent.engine.update(container_id, {"cpu": {"cpus": "none"}})
    await agent.engine.update(container_id, {"pids": {"limit": 77}})
    groups = Path(f"/proc/{started.pid}/cgroup").read_text()
    assert container_id in groups
    await agent.remove(container_id, started)
    with pytest.raises(errors.NotFound):
        await agent.engine.update(container_id, {})
