"""One process of a container, an init or an exec: its state, its streams, and its end, which is set once."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import structlog

from shim.errors import InvalidRequest, StateConflict
from shim.state import State, after
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import Callable

    from shim.guest import GuestProcess
    from shim.io import ProcessIO, Stdio

log = structlog.get_logger()

# What containerd reports when the exit status could not be learned.
UNKNOWN_EXIT_STATUS = 255
# The agent's answer to a status that is no number of 8 bits is not passed on.
_STATUS_MASK = 0xFF
# A terminal's size is two numbers of 16 bits (struct winsize).
_LONGEST_SIDE = 0xFFFF


class Exit(NamedTuple):
    """How a process ended: status 0-255 and nanoseconds since the epoch."""

    status: int
    at_ns: int


class Process:
    """A process from its creation to its deletion. `what` names it in messages, `pid` is the VM's."""

    def __init__(
        self, *, exec_id: str, what: str, stdio: Stdio, io: ProcessIO, guest: GuestProcess, pid: int
    ) -> None:
        self.exec_id = exec_id
        self.what = what
        self.stdio = stdio
        self.pid = pid
        self.state = State.CREATED
        self.lock = asyncio.Lock()
        # Its end as soon as it is seen. `exited` is set when it may be told: its output comes first, and other exits.
        self.seen: Exit | None = None
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._io = io
        self._guest = guest
        self._size: tuple[int, int] | None = None
        # Clear while a start is under way: the end of a short process may be known before the start is.
        self._settled = asyncio.Event()
        self._settled.set()
        self._waiter: asyncio.Task[None] | None = None

    @property
    def starting(self) -> bool:
        """Whether its start is under way."""
        return not self._settled.is_set()

    def watch(self, on_exit: Callable[[Process], None]) -> None:
        """Follow the process in the guest, where it must exist, until its end is `seen`, or never will be."""
        self._waiter = asyncio.create_task(self._wait(on_exit), name=f"wait for {self.what}")

    async def start(self, on_started: Callable[[], None]) -> None:
        """Run it; `on_started` is called before anybody can learn of its end.

        Raises:
            StateConflict: it is not in the created state, or has been given up while it was being started.
            InvalidRequest: its stdin cannot be opened.
            RpcError: the guest refused.
        """
        running = after(self.state, "start", self.what)
        self._settled.clear()
        try:
            self._io.open_stdin()
            await self._guest.start()
            if self.exited.done():
                raise StateConflict(f"cannot start {self.what}: its container ended meanwhile")
            self.state = running
            on_started()
        except BaseException:
            # Clients wait for the end of the streams before they ask for anything else.
            self._io.abort()
            raise
        finally:
            self._settled.set()
        self._io.start(self._guest)
        if self._size is not None:
            await self._resize_started(*self._size)

    async def signal(self, number: int) -> None:
        """Send a signal to the process in the guest."""
        await self._guest.signal(number)

    async def resize(self, width: int, height: int) -> None:
        """Resize the terminal, now or when the process starts; without a terminal there is nothing to do.

        Raises:
            InvalidRequest: no terminal can have this size.
            StateConflict: the process has ended.
        """
        if max(width, height) > _LONGEST_SIDE:
            raise InvalidRequest(
                f"cannot resize the terminal of {self.what} to {width}x{height}: at most {_LONGEST_SIDE} each way"
            )
        if self.state is State.STOPPED:
            raise StateConflict(f"cannot resize the terminal of {self.what}: it is stopped")
        if not self.stdio.terminal:
            return
        self._size = (width, height)
        if self.state is not State.CREATED or not self.exec_id:
            await self._guest.resize(width, height)

    async def _resize_started(self, width: int, height: int) -> None:
        try:
            await self._guest.resize(width, height)
        except RpcError as err:
            # It runs, with a terminal of another size; failing its start now would be worse.
            log.warning("terminal_not_resized", process=self.what, error=str(err))

    def close_stdin(self) -> None:
        """The client will write no more."""
        self._io.close_stdin()

    def set_exited(self, end: Exit) -> bool:
        """Record the end; False when it was known already."""
        if self.exited.done():
            return False
        self.state = after(self.state, "exit", self.what)
        self._io.stop_stdin()
        self.exited.set_result(end)
        return True

    async def wait(self) -> Exit:
        """The end, once it has come. Cancelling the wait leaves the process alone."""
        return await asyncio.shield(self.exited)

    async def aclose(self, *, guest_alive: bool) -> None:
        """Let go of streams and tasks. With a living guest, output still under way is delivered first."""
        await self._io.aclose(drain=guest_alive)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.cancel()
            await asyncio.gather(self._waiter, return_exceptions=True)

    async def _wait(self, on_exit: Callable[[Process], None]) -> None:
        try:
            status = await self._guest.wait() & _STATUS_MASK
            self.seen = Exit(status, time.time_ns())
        except RpcError as err:
            log.info("exit_status_unknown", process=self.what, error=str(err))
        await self._settled.wait()
        if self.seen is not None:
            await self._io.settle()
        on_exit(self)
