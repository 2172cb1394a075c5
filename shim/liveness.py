"""A guest whose agent answers nothing any more is ended when somebody insists on the end of a container.

Nothing is asked while all is well: a hung guest is harmless until it keeps a SIGKILL from its container. Only then is
the agent asked for its health, and only an agent that does not answer that either is given up. A slow one, as under
software emulation on a busy host, has the grace and the time of a health check to say anything at all.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import structlog

from agent_proto.gen import health_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from agent_proto.client import AgentClient

log = structlog.get_logger()

GRACE_S = 5.0
"""For the acknowledgement of a SIGKILL. An agent acknowledges within milliseconds; under emulation, with a dozen guests
booting on two cores, seconds were seen."""


class Liveness:
    """`end_guest` kills the virtual machine; all containers are told of its end in the usual way. None keeps a machine
    that answers nothing, for somebody to look at it. `check_s` is the time for the answer to the health check."""

    def __init__(
        self,
        agent: AgentClient,
        end_guest: Callable[[], Awaitable[None]] | None,
        *,
        grace_s: float = GRACE_S,
        check_s: float = GRACE_S,
    ) -> None:
        self._agent = agent
        self._end_guest = end_guest
        self._grace_s = grace_s
        self._check_s = check_s

    async def kill(self, what: str, delivery: Coroutine[Any, Any, None]) -> None:
        """Deliver a SIGKILL to the container `what`, or end the guest that takes no notice.

        Raises:
            RpcError: the agent refused, or the connection broke.
        """
        signal = asyncio.create_task(delivery)
        try:
            await asyncio.wait([signal], timeout=self._grace_s)
            if signal.done() or await self._answers(signal):
                return await signal
            unanswered_s, problem = (
                self._grace_s + self._check_s,
                "answers neither a SIGKILL nor a health check",
            )
            if self._end_guest is None:
                log.error(
                    "guest_kept", container=what, unanswered_s=unanswered_s, reason=f"its agent {problem}"
                )
                return await signal
            reason = f"its agent {problem}: ending the virtual machine"
            log.error("guest_given_up", container=what, unanswered_s=unanswered_s, reason=reason)
            await self._end_guest()
        finally:
            signal.cancel()
            await asyncio.gather(signal, return_exceptions=True)

    async def _answers(self, signal: asyncio.Task[None]) -> bool:
        """Whether the agent says anything now, if only no."""
        check = asyncio.create_task(self._agent.check(health_pb2.CheckRequest()))
        try:
            ends: set[asyncio.Future[Any]] = {signal, check}
            done, _ = await asyncio.wait(ends, timeout=self._check_s, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            check.cancel()
            await asyncio.gather(check, return_exceptions=True)
