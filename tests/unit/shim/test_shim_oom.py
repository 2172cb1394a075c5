"""Out-of-memory events of a guest that may say anything."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, cast

from agent_proto.gen import agent_pb2
from shim import oom
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent_proto.client import AgentClient
    from shim.container import Container


class Told:
    def __init__(self) -> None:
        self.count = 0

    def out_of_memory(self) -> None:
        self.count += 1


class Answers:
    def __init__(self, answers: Iterator[str]) -> None:
        self.answers = answers
        self.asked = 0

    async def get_oom_event(self, request: agent_pb2.GetOOMEventRequest) -> agent_pb2.OOMEvent:
        self.asked += 1
        await asyncio.sleep(0)
        for container_id in self.answers:
            return agent_pb2.OOMEvent(container_id=container_id)
        raise RpcError(Code.UNIMPLEMENTED, "no more")


async def test_the_container_is_told() -> None:
    told, agent = Told(), Answers(iter(["c", "unknown", "", "c"]))
    await oom.watch(cast("AgentClient", agent), {"c": cast("Container", told)})
    assert (told.count, agent.asked) == (2, 5)  # and it ends when there is no such thing any more


async def test_flood() -> None:
    """After a burst, no more than the period allows; asking for nothing meanwhile."""
    told, agent = Told(), Answers(itertools.repeat("c"))
    loop = asyncio.get_running_loop()
    started = loop.time()
    watching = asyncio.create_task(
        oom.watch(cast("AgentClient", agent), {"c": cast("Container", told)}, burst=5, period_s=0.1)
    )
    await asyncio.wait([watching], timeout=0.35)
    elapsed_s = loop.time() - started
    watching.cancel()
    assert 5 < told.count <= 5 * (int(elapsed_s / 0.1) + 1)
