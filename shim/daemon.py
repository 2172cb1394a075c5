"""The composition root: builds the sandbox, its services and the RPC server, and wires them together."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import structlog

from shim import preload, rpc_log
from shim.api.services import SANDBOX, TASK_V2, TASK_V3
from shim.events import Publisher
from shim.pod_sandbox import PodSandbox
from shim.sandbox import Sandbox
from shim.sandbox_service import SandboxService
from shim.status import status_for
from shim.task_service import TaskService
from ttrpc import Server

if TYPE_CHECKING:
    import socket

    from shim.boot import Boot
    from shim.bootstrap import Bootstrap
    from shim.serve import HostState
    from ttrpc.service import Call, Next

log = structlog.get_logger()

# containerd allows `Shutdown` three seconds; what is still to be told when it is away is lost anyway.
_EVENTS_GRACE_S = 1.0
_REPLIES_GRACE_S = 1.0


async def run(bootstrap: Bootstrap, host: HostState, boot: Boot, listener: socket.socket) -> None:
    """Serve containerd until it shuts us down, or a signal asks for the same."""
    ended = asyncio.Event()
    events = Publisher(bootstrap.ttrpc_address, bootstrap.namespace)
    sandbox = Sandbox(
        bootstrap.id,
        boot,
        host.share,
        events,
        namespace=bootstrap.namespace,
        outlives_containers=bootstrap.sandbox_api,
    )
    if not bootstrap.sandbox_api:
        sandbox.bring_up()
    pod = PodSandbox(sandbox, boot, host.run_dir / "etc")
    shutting_down: asyncio.Task[None] | None = None

    def begin_shut_down() -> asyncio.Task[None]:
        nonlocal shutting_down
        shutting_down = shutting_down or asyncio.create_task(take_down(), name="shut down")
        return shutting_down

    async def shut_down() -> None:
        await asyncio.shield(begin_shut_down())  # to the end, even when the caller goes away

    async def take_down() -> None:
        # Everything is gone before the answer: containerd's next step is to look for what was left behind.
        try:
            await sandbox.stop()
            host.remove()
        finally:
            ended.set()  # what could not be removed is left to `delete`

    async def called(call: Call, request: Any, next_step: Next) -> Any:
        events.try_now()
        return await rpc_log.logged(call, request, next_step)

    server = Server(error_status=status_for, interceptor=called)
    handlers = TaskService(sandbox, shut_down).handlers()
    for service in (TASK_V2, TASK_V3):
        server.register(service, handlers)
    server.register(SANDBOX, SandboxService(pod, shut_down).handlers())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        asyncio.get_running_loop().add_signal_handler(number, begin_shut_down)
    serving = asyncio.create_task(server.serve(listener), name="server")
    preload.load()
    await ended.wait()
    await server.aclose(grace_s=_REPLIES_GRACE_S)
    await asyncio.gather(serving, return_exceptions=True)
    await events.aclose(_EVENTS_GRACE_S)
