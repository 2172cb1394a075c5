"""The composition root: builds the sandbox, its services and the RPC server, and wires them together."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import structlog

from shim import rpc_log
from shim.api.services import TASK_V2, TASK_V3
from shim.events import Publisher
from shim.sandbox import Sandbox
from shim.status import status_for
from shim.task_service import TaskService
from ttrpc import Server

if TYPE_CHECKING:
    import socket

    from shim.boot import Boot
    from shim.bootstrap import Bootstrap
    from shim.serve import HostState

log = structlog.get_logger()

# containerd allows `Shutdown` three seconds; what is still to be told when it is away is lost anyway.
_EVENTS_GRACE_S = 1.0
_REPLIES_GRACE_S = 1.0


async def run(bootstrap: Bootstrap, host: HostState, boot: Boot, listener: socket.socket) -> None:
    """Serve containerd until it shuts us down, or SIGTERM asks for the same."""
    ended = asyncio.Event()
    events = Publisher(bootstrap.ttrpc_address, bootstrap.namespace)
    sandbox = Sandbox(bootstrap.id, boot, host.share, events)
    sandbox.bring_up()

    async def shut_down() -> None:
        # Everything is gone before the answer: containerd's next step is to look for what was left behind.
        try:
            await sandbox.stop()
            host.remove()
        finally:
            ended.set()  # what could not be removed is left to `delete`

    server = Server(error_status=status_for, interceptor=rpc_log.logged)
    handlers = TaskService(sandbox, shut_down).handlers()
    for service in (TASK_V2, TASK_V3):
        server.register(service, handlers)
    terminating: set[asyncio.Task[None]] = set()
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGTERM, lambda: terminating.add(asyncio.create_task(shut_down()))
    )
    serving = asyncio.create_task(server.serve(listener), name="server")
    await ended.wait()
    await server.aclose(grace_s=_REPLIES_GRACE_S)
    await asyncio.gather(serving, return_exceptions=True)
    await events.aclose(_EVENTS_GRACE_S)
