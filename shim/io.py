"""A process's stdio: between the host's streams and those that the guest's agent offers.

Nothing here blocks the event loop, loses a byte, or lets one stream wait for another:

- The shim keeps a read end of every output FIFO open until the process is deleted, so that what a short process wrote
  is still there for a reader that comes late, or comes back after containerd's restart. The write end is closed at the
  end of the stream: that is how readers learn of it.
- The shim keeps a write end of the stdin FIFO open, so that the end of the stream comes when containerd says
  `CloseIO` and its client has closed too, not when no client happens to be connected.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

import structlog

from shim.errors import InvalidRequest
from shim.host_streams import Input, Output, parse_uri
from shim.logger import SCHEMES as LOGGER_SCHEMES
from shim.logger import Logger
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

log = structlog.get_logger()

# What one call asks the agent for, in bytes: the size of the pipes that our agent gives a process.
READ_SIZE = 256 * 1024
# How long the exit of a process is held back for the last of its output. containerd's clients stop reading when they
# learn of the exit; a child that lives on and holds the streams must not delay it by a second.
_SETTLE_IDLE_S, _SETTLE_LIMIT_S = 0.4, 0.7
# How long deleting a process waits for output that does not move: the process is gone, and whoever holds the other end
# of its pipe, or should read our FIFO, does nothing. runc's shim waits as long.
_IDLE_LIMIT_S = 2.0
# How long it waits for output that does move. What the process itself has left fits into a pipe; a child of it that
# lives on may write for ever.
_DRAIN_LIMIT_S = 10.0


class Stdio(NamedTuple):
    """Where a process's streams are on the host, as containerd names them; empty means none."""

    stdin: str = ""
    stdout: str = ""
    stderr: str = ""
    terminal: bool = False


class GuestStreams(Protocol):
    """The other side: the process's streams in the guest. Empty bytes are the end of a stream."""

    async def read_stdout(self, size: int) -> bytes: ...
    async def read_stderr(self, size: int) -> bytes: ...
    async def write_stdin(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...


class ProcessIO:
    """All streams of one process and the tasks that copy them."""

    def __init__(self, stdio: Stdio, what: str, logger: Logger | None = None) -> None:
        """Open the host's ends of the output, or use those of `logger`, which is taken over.

        Raises:
            InvalidRequest: a path cannot be opened or its scheme is unknown; nothing stays open.
        """
        self._stdin: Input | None = None
        self._outputs: list[tuple[str, Output]] = []
        self._logger = logger
        self._copies: list[asyncio.Task[None]] = []
        self._stdin_copy: asyncio.Task[None] | None = None
        self._what = what
        try:
            if stdio.stdin:
                name = f"stdin of {what}"
                self._stdin = Input(parse_uri(stdio.stdin, name, schemes=("fifo",)), name)
            # A terminal has one stream for both; containerd passes no stderr then, and none is used if it does.
            stderr = "" if stdio.terminal else stdio.stderr
            if logger is not None:
                self._outputs = [("stdout", logger.stdout), ("stderr", logger.stderr)]
                if stdio.terminal:
                    self._outputs.pop()[1].finish()
                return
            for stream, text in (("stdout", stdio.stdout), ("stderr", stderr)):
                if text:
                    name = f"{stream} of {what}"
                    uri = parse_uri(text, name, schemes=("fifo", "file"))
                    self._outputs.append((stream, Output.open(uri, name)))
        except InvalidRequest:
            self._release()
            raise

    @classmethod
    async def open(cls, stdio: Stdio, what: str, *, owner: str, namespace: str) -> ProcessIO:
        """As the constructor, but runs the logger first if stdout names one: it takes stderr too, whatever that names.

        `owner` is the id of the container or exec.

        Raises:
            InvalidRequest: as the constructor, or the logger cannot be run; nothing stays open.
        """
        name = f"stdout of {what}"
        logger = None
        if stdio.stdout.startswith(tuple(f"{scheme}://" for scheme in LOGGER_SCHEMES)):
            uri = parse_uri(stdio.stdout, name, schemes=LOGGER_SCHEMES)
            logger = await Logger.start(uri, what, owner=owner, namespace=namespace)
        return cls(stdio, what, logger)

    def open_stdin(self) -> None:
        """Let the client's input come; the process is about to start.

        Raises:
            InvalidRequest: its path cannot be opened.
        """
        if self._stdin is not None:
            self._stdin.open()

    def start(self, guest: GuestStreams) -> None:
        """Begin copying; the process must exist in the guest."""
        for name, output in self._outputs:
            read = guest.read_stdout if name == "stdout" else guest.read_stderr
            self._copies.append(_spawn(self._copy_out(read, output), f"{name} of {self._what}"))
        if self._stdin is not None:
            self._stdin_copy = _spawn(self._copy_in(self._stdin, guest), f"stdin of {self._what}")

    def close_stdin(self) -> None:
        """What `CloseIO` asks for. Harmless without stdin."""
        if self._stdin is not None:
            self._stdin.give_up_keeper()

    def stop_stdin(self) -> None:
        """The process has exited and reads no more."""
        if self._stdin_copy is not None:
            self._stdin_copy.cancel()

    async def settle(self) -> None:
        """The process has exited: wait until its output has reached the readers, within a limit below a second."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_LIMIT_S):
                if not await self._drained(_SETTLE_IDLE_S, _SETTLE_LIMIT_S):
                    for _, output in self._outputs:
                        await output.taken()

    async def aclose(self, *, drain: bool = True) -> None:
        """Let go of everything; `drain` first waits for output still under way, as long as it moves within reason."""
        if drain and (reason := await self._drained(_IDLE_LIMIT_S, _DRAIN_LIMIT_S)):
            log.info("output_abandoned", what=self._what, reason=reason)
        tasks = [*self._copies, *([self._stdin_copy] if self._stdin_copy else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._release()
        if self._logger is not None:
            await self._logger.aclose()

    async def _drained(self, idle_s: float, limit_s: float) -> str:
        """Wait for the end of the output. Returns why it was given up: empty if it has come to its end."""
        pending = set(self._copies)
        deadline = asyncio.get_running_loop().time() + limit_s
        while pending:
            before = self._written
            _, pending = await asyncio.wait(pending, timeout=idle_s)
            if pending and self._written == before:
                return "nothing moved"
            if pending and asyncio.get_running_loop().time() > deadline:
                return "it does not end"
        return ""

    def abort(self) -> None:
        """Let go of everything at once: the guest is gone, or the process never came to be."""
        for task in (*self._copies, *([self._stdin_copy] if self._stdin_copy else [])):
            task.cancel()
        self._release()

    @property
    def _written(self) -> int:
        return sum(output.written for _, output in self._outputs)

    def _release(self) -> None:
        if self._stdin is not None:
            self._stdin.release()
        for _, output in self._outputs:
            output.release()
        if self._logger is not None:
            self._logger.release()

    async def _copy_out(self, read: Callable[[int], Awaitable[bytes]], output: Output) -> None:
        # One piece is asked for while the one before it is written: never two, whose answers might change places.
        coming = asyncio.ensure_future(_read_or_end(read))
        try:
            while data := await coming:
                coming = asyncio.ensure_future(_read_or_end(read))
                await output.write(data)
        finally:
            coming.cancel()
            output.finish()

    async def _copy_in(self, stdin: Input, guest: GuestStreams) -> None:
        try:
            while data := await stdin.read():
                await guest.write_stdin(data)
            await guest.close_stdin()
        except RpcError as err:
            # The process closed its end or exited: what was meant for it has no reader any more.
            log.debug("stdin_ended", what=self._what, error=str(err))


async def _read_or_end(read: Callable[[int], Awaitable[bytes]]) -> bytes:
    """Agents of Kata before 4.1 answer the end of a stream with an error instead of no data."""
    try:
        return await read(READ_SIZE)
    except RpcError as err:
        log.debug("output_ended", error=str(err))
        return b""


def _spawn(copy: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
    task = asyncio.create_task(copy, name=name)
    task.add_done_callback(_tell_of_failure)
    return task


def _tell_of_failure(task: asyncio.Task[None]) -> None:
    # Nobody waits for its result: what neither side is expected to raise must not pass in silence.
    if not task.cancelled() and (err := task.exception()) is not None:
        log.error("copy_failed", what=task.get_name(), exc_info=err)
