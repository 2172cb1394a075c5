"""The container engine, as the rest of the agent sees it: `oci_engine`, in threads of its own.

A verb of the engine waits: for the kernel, for a new process, for hooks. Each runs in a thread, so the event loop
goes on; its forks are made in that thread. What it starts on the way the reaper collects, which tells it when that
ends.
"""

from __future__ import annotations

import socket
import sys
from _thread import allocate_lock
from asyncio import get_running_loop
from functools import partial
from typing import TYPE_CHECKING

from guest_agent import errors, syscalls
from guest_agent.spawn import in_thread
from guest_agent.stdio import Stdio

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from typing import TypeVar

    from guest_agent.log import Log
    from guest_agent.oci import Json
    from guest_agent.reaper import Reaper
    from oci_engine import container
    from oci_engine.options import Streams

    T = TypeVar("T")

STATE_DIR = "/run/kata-py/containers"


class Started:
    """A process the engine made: its pid, its exit code to come, its streams."""

    __slots__ = ("exited", "pid", "stdio")

    def __init__(self, pid: int, exited: asyncio.Future[int], stdio: Stdio) -> None:
        self.pid = pid
        self.exited = exited
        self.stdio = stdio


class Engine:
    """The engine with its state in one directory."""

    def __init__(self, reaper: Reaper, log: Log, *, state_dir: str = STATE_DIR) -> None:
        self._reaper = reaper
        self._log = log
        self._loop = get_running_loop()
        self._state_dir = state_dir
        self._loaded: container.Engine | None = None
        syscalls.use_one_heap()

    def prepare(self) -> None:
        """What the first container would otherwise have to wait for: the engine's modules."""
        self._engine()
        from oci_engine import making
        from oci_engine.cgroups import device_program, device_rules

        del making, device_program, device_rules  # to have them loaded is all

    def _engine(self) -> container.Engine:
        if self._loaded is None:
            from oci_engine.container import Engine

            self._loaded = Engine(self._state_dir, self._wait, self._warn)
        return self._loaded

    def _warn(self, text: str) -> None:
        """Called in the engine's threads."""
        self._loop.call_soon_threadsafe(lambda: self._log.warning("specification", problem=text))

    async def create(self, container_id: str, bundle: str, *, terminal: bool, pipe_size: int) -> Started:
        """Make the container of a bundle; its process waits for `start`. Raises EngineFailed, InvalidRequest."""
        from oci_engine.options import CreateOptions

        def create(streams: Streams) -> int:
            options = CreateOptions(streams=streams, no_new_keyring=True)
            return self._engine().create(container_id, bundle, options)

        return await self._process(create, terminal, pipe_size)

    async def start(self, container_id: str) -> None:
        """Let the created process run its program. Raises StateConflict, EngineFailed for a hook."""
        await self._verb(lambda: self._engine().start(container_id))

    async def exec(self, container_id: str, process: Json, *, terminal: bool, pipe_size: int) -> Started:
        """Run another process in a running container. Raises EngineFailed, InvalidRequest, StateConflict."""
        from oci_engine.options import ExecOptions

        def execute(streams: Streams) -> int:
            return self._engine().exec(container_id, process, ExecOptions(streams=streams))[0]

        return await self._process(execute, terminal, pipe_size)

    async def update(self, container_id: str, resources: Json) -> None:
        """Change the limits of a container. Raises EngineFailed, InvalidRequest."""
        await self._verb(lambda: self._engine().update(container_id, resources))

    async def delete_with_hooks(self, container_id: str) -> None:
        """Remove a stopped container by the engine itself, which also runs the poststop hooks."""
        for complaint in await self._verb(lambda: self._engine().delete(container_id, force=True)):
            self._log.warning("hook_failed", container=container_id, error=complaint)

    def forget(self, container_id: str) -> None:
        """Remove what the engine knows of a container whose processes and cgroup are gone."""
        self._engine().forget(container_id)

    async def _process(self, make: Callable[[Streams], int], terminal: bool, pipe_size: int) -> Started:
        from oci_engine.options import Streams

        # A process that ends at once is collected before its pid is known here.
        with self._reaper.births():
            if terminal:
                pid, stdio = await self._on_terminal(make)
            else:
                stdio, theirs = Stdio.pipes(pipe_size)
                try:
                    with theirs:
                        pid = await self._verb(partial(make, Streams(stdio=theirs.fds)))
                except BaseException:
                    stdio.close()
                    raise
            return Started(pid, self._reaper.watch(pid), stdio)

    async def _on_terminal(self, make: Callable[[Streams], int]) -> tuple[int, Stdio]:
        """The engine opens the terminal inside the container and sends us its controlling side."""
        from oci_engine.options import Streams

        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                pid = await self._verb(partial(make, Streams(console=theirs.fileno())))
            # It was sent before the process was made, so nothing here waits.
            return pid, Stdio.terminal(_receive_fd(ours))

    async def _verb(self, verb: Callable[[], T]) -> T:
        """Do it in a thread, and turn the engine's errors into the agent's. It cannot be cancelled."""
        from oci_engine.errors import EngineError

        with self._reaper.births():
            try:
                return await in_thread(verb)
            except EngineError as err:
                raise _translated(err) from err

    def _wait(self, pid: int) -> int:
        """Called in the engine's threads: the exit code of what the engine has started, from the reaper."""
        ended = allocate_lock()
        ended.acquire()
        codes: list[int] = []

        def tell(exited: asyncio.Future[int]) -> None:
            codes.append(exited.result())
            ended.release()

        self._loop.call_soon_threadsafe(lambda: self._reaper.watch(pid).add_done_callback(tell))
        ended.acquire()
        return codes[0]


def _translated(error: Exception) -> errors.AgentError:
    from oci_engine import errors as engine

    if isinstance(error, engine.SpecError):
        return errors.InvalidRequest(str(error))
    if isinstance(error, engine.CannotExecute) and error.status == 127:
        return errors.InvalidRequest(str(error))
    if isinstance(error, engine.NotFound):
        return errors.NotFound(str(error))
    if isinstance(error, engine.StateConflict):
        return errors.StateConflict(str(error))
    if isinstance(error, engine.AlreadyExists):
        return errors.AlreadyExists(str(error))
    return errors.EngineFailed(str(error))


def _receive_fd(connection: socket.socket) -> int:
    _data, control, _flags, _address = connection.recvmsg(1024, socket.CMSG_SPACE(4))
    for _level, kind, data in control:
        if kind == socket.SCM_RIGHTS:
            return int.from_bytes(data[:4], sys.byteorder)
    raise errors.EngineFailed("the engine sent no terminal")
