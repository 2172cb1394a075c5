"""Wires the agent together: event loop, services, log stream; and lives until the machine is to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import traceback
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from guest_agent import errors, logstream, rpc
from guest_agent.engine import Engine
from guest_agent.modules import ModuleMissing
from guest_agent.reaper import Reaper
from guest_agent.sandbox import Sandbox
from guest_agent.service import AgentService
from guest_agent.uevent import Uevents
from guest_agent.watch import FileWatch
from ttrpc import Code, Server, Status

if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable

    from guest_agent.cmdline import Settings
    from guest_agent.log import Log
    from guest_agent.modules import Modules
    from ttrpc import Call, Next

#: How long answers that are on their way may take after the sandbox was destroyed.
CLOSING_GRACE_S = 1.0
#: Calls come in bursts; after so long without one there is time for something else.
QUIET_S = 0.1
#: So long may calls put something off. Without an end to it a host that always wants something would get an agent that
#: never collects its garbage.
PATIENCE_S = 10.0
#: Drivers that a sandbox may come to need, loaded when the host leaves us time.
LATER_MODULES = ("virtio_net", "virtio_blk", "overlay")
_WAITING_CALLS = frozenset(
    {"AcceptConnection", "GetOOMEvent", "NextNames", "ReadStderr", "ReadStdout", "WaitProcess", "WriteStdin"}
)
_CODES: dict[type[BaseException], Code] = {
    errors.InvalidRequest: Code.INVALID_ARGUMENT,
    errors.NotFound: Code.NOT_FOUND,
    errors.AlreadyExists: Code.ALREADY_EXISTS,
    errors.StateConflict: Code.FAILED_PRECONDITION,
    errors.NotSupported: Code.UNIMPLEMENTED,
    errors.EngineFailed: Code.INTERNAL,
    ModuleMissing: Code.NOT_FOUND,
    FileNotFoundError: Code.NOT_FOUND,
    OSError: Code.INTERNAL,
}


def status_for(error: Exception) -> Status:
    """The status for an error of a handler. One that is not in the table is a defect: OK makes ttrpc log it."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return Status(_CODES[kind], str(error))
    return Status(Code.OK)


class Agent:
    """Everything that runs in the event loop."""

    def __init__(self, settings: Settings, modules: Modules, log: Log) -> None:
        self._log = log
        self._reaper = Reaper()
        engine = Engine(self._reaper, log)
        self._sandbox = Sandbox(
            engine, modules, FileWatch(), self._reaper, log, pipe_size=settings.container_pipe_size
        )
        self._quiet = QuietTime(self._later_work(modules), log)
        self._server = Server(status_for, self._quiet.around)
        service = AgentService(self._sandbox, settings, Uevents(), log)
        self._server.register(rpc.agent(), service.handlers())
        self._server.register(rpc.health(), service.health_handlers())
        self._server.register(rpc.extensions(), service.extension_handlers())

    def _later_work(self, modules: Modules) -> list[Callable[[], None]]:
        drivers = (partial(modules.load_if_present, name) for name in LATER_MODULES)
        return [self._sandbox.prepare, *drivers, gc.freeze, gc.enable]

    async def run(self, listener: socket.socket, log_listener: socket.socket | None) -> None:
        """Serve until the sandbox is destroyed."""
        self._reaper.start()
        loop = asyncio.get_running_loop()
        serving = loop.create_task(self._server.serve(listener))
        if log_listener is not None:
            following = loop.create_task(logstream.serve(log_listener, self._log))
        stopped = loop.create_task(self._sandbox.stopped.wait())
        self._quiet.begin()
        done, _ = await asyncio.wait([serving, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await self._server.aclose(CLOSING_GRACE_S)
        if log_listener is not None:
            following.cancel()


class QuietTime:
    """Does work that can wait, a piece at a time, when no call runs and none came for a while; in the end anyway."""

    def __init__(
        self,
        work: list[Callable[[], None]],
        log: Log,
        *,
        quiet_s: float = QUIET_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._work = deque(work)
        self._log = log
        self._quiet_s = quiet_s
        self._patience_s = patience_s
        self._running = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start waiting for quiet."""
        self._wait()
        asyncio.get_running_loop().call_later(self._patience_s, self._do_rest)

    def _wait(self) -> None:
        self._stop()
        if self._work and self._running == 0:
            self._timer = asyncio.get_running_loop().call_later(self._quiet_s, self._do_one)

    async def around(self, call: Call, request: Any, proceed: Next) -> Any:
        """Interceptor of the server. Calls that last as long as a process does are no disturbance."""
        if call.method in _WAITING_CALLS:
            return await proceed(request, call)
        self._stop()
        self._running += 1
        try:
            return await proceed(request, call)
        finally:
            self._running -= 1
            self._wait()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _do_one(self) -> None:
        self._do(self._work.popleft())
        self._wait()

    def _do_rest(self) -> None:
        """One piece, and the next after whatever else the loop has to do."""
        self._stop()
        if self._work:
            self._do(self._work.popleft())
            asyncio.get_running_loop().call_soon(self._do_rest)

    def _do(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as err:
            self._log.warning("later_work_failed", error=str(err))


def run(
    listener: _socket.socket,
    log_listener: _socket.socket | None,
    settings: Settings,
    modules: Modules,
    log: Log,
) -> None:
    """The event loop's life. Raises what ended it, if not the destruction of the sandbox."""

    async def live() -> None:
        await Agent(settings, modules, log).run(
            _adopted(listener), _adopted(log_listener) if log_listener else None
        )

    logging.getLogger().addHandler(_LibraryLog(log))
    loop = asyncio.new_event_loop()
    loop.run_until_complete(live())


class _LibraryLog(logging.Handler):
    """What ttrpc and asyncio log, in the agent's log."""

    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        values: dict[str, object] = {"library": record.name}
        if record.exc_info is not None and record.exc_info[1] is not None:
            values["traceback"] = "".join(traceback.format_exception(record.exc_info[1]))
        write = {"ERROR": self._log.error, "CRITICAL": self._log.error, "WARNING": self._log.warning}
        write.get(record.levelname, self._log.debug)(record.getMessage(), **values)


def _adopted(early: _socket.socket) -> socket.socket:
    """The socket that listened before the socket module was there."""
    return socket.socket(early.family, early.type, early.proto, early.detach())
