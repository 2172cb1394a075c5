"""The guest's word that its kernel killed something for lack of memory, passed on to the container it happened in.

The guest is asked again after each answer, and it may say anything at any rate: what it is allowed is a burst, as when
all containers of a pod run out of memory at once, and then a trickle.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from agent_proto.gen import agent_pb2
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent_proto.client import AgentClient
    from shim.container import Container

log = structlog.get_logger()

_BURST = 32
_PERIOD_S = 30.0


async def watch(
    agent: AgentClient,
    containers: Mapping[str, Container],
    *,
    burst: int = _BURST,
    period_s: float = _PERIOD_S,
) -> None:
    """Listen until the agent is gone or has no such events; at most `burst` answers are taken in `period_s`."""
    loop = asyncio.get_running_loop()
    while True:
        since = loop.time()
        for _ in range(burst):
            try:
                event = await agent.get_oom_event(agent_pb2.GetOOMEventRequest())
            except RpcError as err:
                log.debug("oom_events_ended", error=str(err))
                return
            if container := containers.get(event.container_id):
                container.out_of_memory()
        await asyncio.sleep(max(0.0, since + period_s - loop.time()))
