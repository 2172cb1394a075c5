"""QEMU's monitor: the session with it. Nothing else talks QMP; rare commands are typed in `qemu.commands`.

The handshake (connect, greeting, capabilities) is retried as one unit. QEMU is given a socket that already
listens, so connecting always succeeds; what may be late or lost is the greeting, and a monitor that was
dropped in the middle serves the next connection.

`qemu.qmp` is imported when the first connection is made, not with this module: by then QEMU is already
starting. The library reports every failed attempt as an error in the `logging` module; we report what matters
ourselves.

Commands go one at a time: a descriptor is for the command that follows it, so nothing may come in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import structlog

from hypervisor.errors import HostUnsupported, QmpRefused, QmpUnavailable
from hypervisor.sockets import unix_connection
from hypervisor.waiting import outlast

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
    from pathlib import Path
    from typing import Any, TypeAlias

    from qemu.qmp import EventListener, QMPClient

    from hypervisor.process import ProcessExit
    from hypervisor.qemu.events import Event
    from hypervisor.spec import QmpTimeouts

    OnEvent: TypeAlias = Callable[[Event], None]
    _Session: TypeAlias = tuple[QMPClient, EventListener]

log = structlog.get_logger(__name__)

# QEMU runs an untrusted guest, so its messages are bounded; the longest that it has reason to send,
# the list of its types, has some 60 kB.
_MESSAGE_BYTES = 1 << 20
_PROBLEM_CHARS = 200
# The first with `-machine memory-backend=`, by which guests share their memory with virtiofsd and us.
OLDEST_QEMU = (5, 0)


class Monitor:
    """Commands to a running QEMU. Each raises QmpRefused when QEMU answers with an error, and QmpUnavailable
    when it does not answer in time or the connection is gone.
    """

    def __init__(self, client: QMPClient, path: Path, command_timeout_s: float) -> None:
        self._client = client
        self._path = path
        self._command_timeout_s = command_timeout_s
        self._one_at_a_time = asyncio.Lock()
        self._listeners: list[OnEvent] = []

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, of its greeting."""
        greeting = self._client.greeting
        numbers = greeting.QMP.version.get("qemu") if greeting is not None else None
        if isinstance(numbers, dict):
            major, minor, micro = (numbers.get(part) for part in ("major", "minor", "micro"))
            if isinstance(major, int) and isinstance(minor, int) and isinstance(micro, int):
                return major, minor, micro
        raise QmpUnavailable(f"QEMU's monitor at {self._path} greeted without a version")

    @contextmanager
    def listening(self, on_event: OnEvent) -> Iterator[None]:
        """`on_event` hears of every event that arrives during the block."""
        self._listeners.append(on_event)
        try:
            yield
        finally:
            self._listeners.remove(on_event)

    async def lost(self) -> None:
        """Return when the connection is gone; no event arrives after that."""
        from qemu.qmp import Runstate

        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def query_status(self) -> str:
        """QEMU's word for the machine's state: "running", "paused", "shutdown", ..."""
        reply = await self.execute("query-status")
        if isinstance(reply, dict) and isinstance(status := reply.get("status"), str):
            return status
        raise QmpUnavailable(f"QEMU's monitor at {self._path} answered query-status without a status")

    async def stop(self) -> None:
        """Stop all virtual processors."""
        await self.execute("stop")

    async def cont(self) -> None:
        """Let them run again."""
        await self.execute("cont")

    async def quit(self) -> None:
        """Ask QEMU to end itself."""
        await self.execute("quit")

    async def system_powerdown(self) -> None:
        """Press the machine's power button; the guest may ignore it."""
        await self.execute("system_powerdown")

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, fd: int | None = None
    ) -> object:
        """QEMU's answer to a command. `fd` goes with it, for commands that take a descriptor; it stays open here."""
        from qemu.qmp import ExecInterruptedError, ExecuteError, QMPError

        try:
            async with self._one_at_a_time, asyncio.timeout(self._command_timeout_s):
                if fd is not None:
                    self._client.send_fd_scm(fd)
                return await self._client.execute(command, arguments)
        except ExecuteError as err:
            raise QmpRefused(command, err.error_class, _line(str(err))) from err
        except TimeoutError as err:
            limit = f"{self._command_timeout_s:g} s"
            raise QmpUnavailable(
                f"QEMU's monitor at {self._path} did not answer {command} within {limit}"
            ) from err
        # StateError: it was gone before; BadReplyError: it says what no QEMU says; OSError: of sending the descriptor.
        except (ExecInterruptedError, QMPError, OSError) as err:
            raise QmpUnavailable(f"QEMU's monitor at {self._path} is gone, cannot {command}") from err

    def _dispatch(self, event: Event) -> None:
        for listener in [*self._listeners]:
            listener(event)


@asynccontextmanager
async def connected(
    path: Path, timeouts: QmpTimeouts, qemu_exited: asyncio.Future[ProcessExit], on_event: OnEvent
) -> AsyncIterator[Monitor]:
    """The monitor at `path` for the length of the block; `on_event` gets each event that we know.

    Raises QmpUnavailable when no handshake succeeded in `timeouts.connect_timeout_s`, and at once when QEMU
    ends; HostUnsupported when it is too old.
    """
    client, events = await _unless_exited(_handshake(path, timeouts), qemu_exited)
    monitor = Monitor(client, path, timeouts.command_timeout_s)
    watching = asyncio.create_task(_pass_on(events, monitor))
    try:
        _check_age(monitor.version)
        with monitor.listening(on_event):
            yield monitor
    finally:
        watching.cancel()
        await _disconnect(client)


async def _unless_exited(
    handshake: Coroutine[None, None, _Session], qemu_exited: asyncio.Future[ProcessExit]
) -> _Session:
    task = asyncio.create_task(handshake)
    try:
        waited: list[asyncio.Future[Any]] = [task, qemu_exited]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        if qemu_exited.done():
            raise QmpUnavailable("QEMU ended before its monitor answered")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait([task])


async def _handshake(path: Path, timeouts: QmpTimeouts) -> _Session:
    attempts = 0
    problem = "no attempt made"
    try:
        async with asyncio.timeout(timeouts.connect_timeout_s):
            while True:
                attempts += 1
                try:
                    return await _attempt(path, timeouts.read_timeout_s)
                except _AttemptFailed as err:
                    problem = str(err)
                log.debug("qmp_attempt_failed", path=str(path), attempt=attempts, problem=problem)
                await asyncio.sleep(timeouts.retry_pause_s)
    except TimeoutError:
        raise QmpUnavailable(
            f"QEMU's monitor at {path} gave no handshake within {timeouts.connect_timeout_s:g} s "
            f"({attempts} attempts, the last: {problem})"
        ) from None


class _AttemptFailed(Exception):
    """One handshake failed; the text says how."""


async def _attempt(path: Path, read_timeout_s: float) -> _Session:
    from qemu.qmp import EventListener, QMPClient

    _silence_library()
    client = QMPClient(readbuflen=_MESSAGE_BYTES)
    events = EventListener()
    client.register_listener(events)  # before connecting: what QEMU tells first counts too
    try:
        sock = unix_connection(path)
    except OSError as err:
        raise _AttemptFailed(f"cannot connect: {err.strerror}") from err
    connecting = asyncio.create_task(client.connect(sock))
    try:
        done, _ = await asyncio.wait([connecting], timeout=read_timeout_s)
        if not done:
            raise _AttemptFailed(f"no answer within {read_timeout_s * 1000:.0f} ms")
        _check(connecting)
    except BaseException:
        await _abandon(client, connecting, sock)
        raise
    return client, events


def _check(connecting: asyncio.Task[None]) -> None:
    from qemu.qmp import ConnectError

    try:
        connecting.result()
    except ConnectError as err:
        # The library's texts may be empty, or go on with the raw bytes on lines of their own.
        reason = str(err.exc).partition("\n")[0] or type(err.exc).__name__
        raise _AttemptFailed(f"{err.error_message}: {reason[:_PROBLEM_CHARS]}") from err
    except AssertionError as err:  # the library does not expect the peer to hang up at this very moment
        raise _AttemptFailed("the connection broke right after the handshake") from err


async def _abandon(client: QMPClient, connecting: asyncio.Task[None], sock: socket.socket) -> None:
    """End an attempt by hanging up: cancelled in the middle, the library loses track of its own tasks."""
    if not connecting.done():
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        await outlast(connecting)
    if connecting.exception() is None or isinstance(connecting.exception(), AssertionError):
        await _disconnect(client)
    sock.close()


def _silence_library() -> None:
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


def _check_age(version: tuple[int, int, int]) -> None:
    if version[:2] < OLDEST_QEMU:
        found, needed = ".".join(map(str, version)), ".".join(map(str, OLDEST_QEMU))
        raise HostUnsupported(f"QEMU {found} is too old; install {needed} or later, or name one as path")


async def _pass_on(events: EventListener, monitor: Monitor) -> None:
    async for message in events:
        from hypervisor.qemu.events import event_from

        name, data = str(message["event"]), message.get("data")
        event = event_from(name, data if isinstance(data, dict) else {})
        if event is None:
            log.debug("qmp_event", event_name=name, data=data)
        else:
            monitor._dispatch(event)


def _line(text: str) -> str:
    return " ".join(text.split())[:_PROBLEM_CHARS]


async def _disconnect(client: QMPClient) -> None:
    """Let go of the connection. How it broke meanwhile is for the log: nobody waits for an answer any more."""
    from qemu.qmp import QMPError

    disconnecting = asyncio.create_task(client.disconnect())
    await outlast(disconnecting)
    try:
        disconnecting.result()
    except (OSError, EOFError) as err:
        log.debug("qmp_connection_was_lost", error=repr(err))
    except (QMPError, ValueError) as err:  # ValueError: not UTF-8, or a line without end
        log.warning("qmp_protocol_broken", error=str(err).partition("\n")[0][:_PROBLEM_CHARS])
