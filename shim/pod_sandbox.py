"""The life of a sandbox that containerd manages by its Sandbox API: created, started, stopped, each once.

Without a pause container the sandbox itself is the pod: it is ready from its start until it is stopped or its machine
dies, whatever becomes of its containers. A sandbox of the other kind, which lives as long as its containers, answers
the questions of the API as well; only its life is not the API's to begin.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING

import structlog

from shim.errors import AlreadyExists, GuestUnreachable, ShimError, StateConflict
from shim.pod import write_etc
from shim.state import State
from ttrpc import RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from shim.boot import Boot
    from shim.container import Container
    from shim.pod import Pod
    from shim.process import Exit
    from shim.sandbox import Sandbox

log = structlog.get_logger()

# A SIGKILL takes milliseconds to come back as an exit; a guest that does not answer is killed as a whole.
_KILL_LIMIT_S = 2.0


class Phase(Enum):
    """Where a sandbox is in its life."""

    EXPECTED = "expected"
    CREATED = "created"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


class PodSandbox:
    """The verbs of the Sandbox API on one sandbox. `etc_folder` is where its containers' files of /etc are written."""

    def __init__(self, sandbox: Sandbox, boot: Boot, etc_folder: Path) -> None:
        self.sandbox = sandbox
        self.created_at_ns = time.time_ns()
        self._boot = boot
        self._etc_folder = etc_folder
        self._phase = Phase.EXPECTED if sandbox.outlives_containers else Phase.STARTING
        self._stopping: asyncio.Task[None] | None = None

    @property
    def phase(self) -> Phase:
        """Where it is in its life."""
        if self.sandbox.ended.done() or self._stopping is not None:
            return Phase.STOPPED
        return Phase.READY if self._phase is Phase.STARTING and self.sandbox.is_up else self._phase

    def create(self, pod: Pod) -> None:
        """Take in what the pod is, and begin to boot its machine.

        Raises:
            AlreadyExists: it has been created, by this or by its first container.
            StateConflict: it has been stopped already.
            ConfigError, HypervisorError, OSError: there is nothing that could be started.
        """
        phase = self.phase
        if phase is Phase.STOPPED:
            raise self._conflict("create")
        if phase is not Phase.EXPECTED:
            raise AlreadyExists(f"sandbox {self.sandbox.id} already exists: it is {phase.value}")
        if self._boot.failure is not None:
            raise self._boot.failure
        self.sandbox.etc = write_etc(pod, self._etc_folder)
        self._boot.launch(pod)
        self.created_at_ns = time.time_ns()
        self._phase = Phase.CREATED

    async def start(self) -> None:
        """Wait until the guest is up. A caller that goes away leaves it on its way.

        Raises:
            StateConflict: not created, or started before.
            GuestUnreachable: stopped meanwhile.
            HypervisorError, RpcError: the guest did not come up; the sandbox has ended.
        """
        if self.phase is not Phase.CREATED:
            raise self._conflict("start")
        self._phase = Phase.STARTING
        self.sandbox.bring_up()
        await self.sandbox.wait_until_up()

    async def stop(self, grace_s: float) -> None:
        """End the containers that still run, politely if there is time for that, and the machine. Harmless when
        repeated; the first caller's grace counts."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop(grace_s), name="stop sandbox")
        await asyncio.shield(self._stopping)

    async def wait(self) -> Exit:
        """Its end: status 0 when it was stopped, 255 when its machine died."""
        return await asyncio.shield(self.sandbox.ended)

    def require_ready(self, verb: str) -> None:
        """Raises StateConflict before it is ready, GuestUnreachable after its end."""
        if self.phase is Phase.STOPPED:
            raise GuestUnreachable(f"cannot {verb} sandbox {self.sandbox.id}: it has ended")
        if self.phase is not Phase.READY:
            raise self._conflict(verb)

    def _conflict(self, verb: str) -> StateConflict:
        return StateConflict(f"cannot {verb} sandbox {self.sandbox.id}: it is {self.phase.value}")

    async def _stop(self, grace_s: float) -> None:
        for number, limit_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _KILL_LIMIT_S)):
            running = [c for c in self.sandbox.containers if c.init.state is not State.STOPPED]
            if running and limit_s > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(limit_s):
                        await asyncio.gather(*(_end(container, number) for container in running))
        await self.sandbox.stop()


async def _end(container: Container, number: int) -> None:
    try:
        await container.kill("", number)
    except (RpcError, ShimError) as err:
        log.debug("container_not_signalled", container=container.id, signal=number, error=str(err))
    else:
        await container.init.wait()
