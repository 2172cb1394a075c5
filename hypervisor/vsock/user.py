"""`UserVsock`: a virtio-vsock device in this process, for hosts without /dev/vhost-vsock.

The VMM speaks vhost-user over one end of a socket pair (`vhost_user`, `backend`), guest memory is mapped
(`memory`), packets go through the rings (`vring`, `packet`) and become bytes of ordinary sockets
(`flows`, `feed`, `switchboard`). All of it runs on the event loop and never blocks.

The guest is not trusted, the VMM only a little more: what either does wrong ends this device, shows in
`broken`, and goes no further.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypervisor.vsock.backend import Backend
from hypervisor.vsock.errors import DeviceBroken, FrontEndViolation, GuestViolation
from hypervisor.vsock.packet import FIRST_GUEST_CID, LAST_GUEST_CID
from hypervisor.vsock.switchboard import Switchboard
from hypervisor.vsock.vhost_user import Channel

if TYPE_CHECKING:
    from collections.abc import Callable

_RX, _TX = 0, 1
_MESSAGES_PER_TURN = 64


@dataclass(frozen=True, slots=True)
class Stats:
    """What the device did so far.

    `flows` is how many streams there are now; `dropped_packets` counts those that went nowhere: too short,
    with a wrong address, or refusals for which the guest gave no room.
    """

    flows: int
    bytes_to_guest: int
    bytes_to_host: int
    dropped_packets: int


class UserVsock:
    """One guest's vsock device; satisfies `hypervisor.vsock.Vsock`.

    `sock` is our end of the vhost-user connection and belongs to the device from now on. `broken` is
    resolved with the reason as soon as the device serves no longer: the VMM hung up, the VMM or the guest
    broke the rules, or it was closed.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        guest_cid: int = FIRST_GUEST_CID,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not FIRST_GUEST_CID <= guest_cid <= LAST_GUEST_CID:
            raise ValueError(f"guest_cid {guest_cid}: want {FIRST_GUEST_CID} to {LAST_GUEST_CID}")
        self.guest_cid = guest_cid
        self._loop = loop or asyncio.get_running_loop()
        self.broken: asyncio.Future[DeviceBroken] = self._loop.create_future()
        self._channel = Channel(sock)
        self._backend = Backend(self, guest_cid)
        rx, tx = self._backend.vring(_RX), self._backend.vring(_TX)
        self._switchboard = Switchboard(self._loop, guest_cid, rx, tx, self._guarded)
        self._loop.add_reader(self._channel.fileno(), self._guarded(self._on_message))

    @property
    def driver_up(self) -> bool:
        """Whether the guest's driver has the rings running."""
        return self._backend.vring(_RX).live and self._backend.vring(_TX).live

    @property
    def stats(self) -> Stats:
        board = self._switchboard
        return Stats(
            flows=board.flow_count,
            bytes_to_guest=board.feed.bytes_sent,
            bytes_to_host=board.bytes_to_host,
            dropped_packets=board.dropped_packets + board.feed.refusals_dropped,
        )

    async def connect(self, port: int) -> socket.socket:
        """Connect to `port` of the guest; the socket is connected, non-blocking, and the caller's.

        Waits while the guest's driver is not up, and for its answer, without limit: the caller sets one.
        Raises ConnectionRefusedError when the guest is up and nothing listens there, ConnectionResetError
        (`DeviceBroken`) when the device is gone, ConnectionAbortedError when the guest has too many
        streams.
        """
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        try:
            await self.attach(port, ours)
        except BaseException:
            theirs.close()
            raise
        return theirs

    async def attach(
        self, port: int, sock: socket.socket, greeting: Callable[[int], bytes] | None = None
    ) -> None:
        """Like `connect()`, with the connected stream socket `sock` as the host's end of the stream.

        Takes over `sock`, also when it raises. `sock` gets the bytes of `greeting(host port)` before any of
        the guest's.
        """
        try:
            self._check()
            flow = self._switchboard.open(port, sock, greeting)
        except BaseException:
            sock.close()
            raise
        assert flow.answered is not None
        try:
            await flow.answered
        except asyncio.CancelledError:
            if not flow.answered.cancelled():
                flow.answered.exception()  # it came too late for anyone to see
            self._switchboard.abandon(flow)
            raise

    def listen(self, port: int, on_connection: Callable[[socket.socket], None]) -> None:
        """Accept what the guest connects to `port` of the host (context id 2).

        `on_connection` gets a connected, non-blocking socket and owns it. Raises OSError (EADDRINUSE) when
        the port is taken, DeviceBroken when the device is gone.
        """
        self._check()
        self._switchboard.listen(port, on_connection)

    async def aclose(self) -> None:
        """Close every stream, descriptor and mapping; pending connects raise. Idempotent."""
        reason = "the vsock device was closed"
        self._end(reason)
        self._switchboard.close(reason)
        self._hang_up()

    def _check(self) -> None:
        if self.broken.done():
            raise DeviceBroken(str(self.broken.result()))

    # Called by the back-end.

    def ring_started(self, index: int, kick_fd: int) -> None:
        serve = self._server_of(index)
        if serve is not None:
            self._loop.add_reader(kick_fd, self._guarded(self._on_kick, kick_fd, serve))
            # The driver may have been faster than the VMM: its kick went elsewhere.
            self._loop.call_soon(self._guarded(serve))

    def ring_stopping(self, index: int, kick_fd: int) -> None:
        if self._server_of(index) is not None:
            self._loop.remove_reader(kick_fd)
        if index == _TX:
            # What the guest sent before it was stopped must not depend on which event we saw first.
            self._guarded(self._switchboard.take_last_packets)()

    def driver_reset(self) -> None:
        self._switchboard.reset()

    def _server_of(self, index: int) -> Callable[[], None] | None:
        if index == _RX:
            return self._switchboard.feed.run
        if index == _TX:
            return self._switchboard.take_packets
        return None  # events: nothing a user-space device would have to tell

    # Callbacks of the event loop.

    def _guarded(self, function: Callable[..., None], *args: object) -> Callable[[], None]:
        """`function` as a callback that raises nothing: what it raises ends the device."""

        def call() -> None:
            try:
                function(*args)
            except GuestViolation as err:
                # The front end is answered still: it will want to stop the rings.
                self._abort(f"the guest broke the rules of virtio: {err}", err)
            except EOFError as err:
                self._end(f"vhost-user: {err}", err)
                self._hang_up()
            except (FrontEndViolation, OSError) as err:
                self._abort(f"vhost-user: {err}", err)
                self._hang_up()
            except Exception as err:
                self._abort(f"defect in the vsock device ({type(err).__name__}: {err})", err)
                self._hang_up()

        return call

    def _on_message(self) -> None:
        for _ in range(_MESSAGES_PER_TURN):
            message = self._channel.receive()
            if message is None:
                return
            try:
                answer = self._backend.handle(message)
                if answer is not None:
                    self._channel.reply(message, answer)
            finally:
                message.close()

    def _on_kick(self, kick_fd: int, serve: Callable[[], None]) -> None:
        with contextlib.suppress(BlockingIOError):
            if not os.read(kick_fd, 8):
                raise FrontEndViolation("a kick descriptor was closed by the front end")
        serve()

    # Ends.

    def _end(self, reason: str, cause: Exception | None = None) -> None:
        """Serve no longer; hosts may still read what the guest had sent."""
        if self.broken.done():
            return
        error = DeviceBroken(reason)
        if cause is not None:
            # Without its traceback, whose frames hold views of guest memory.
            error.__cause__ = cause.with_traceback(None)
        self.broken.set_result(error)
        self._backend.halt()
        self._switchboard.part(reason)

    def _abort(self, reason: str, cause: Exception) -> None:
        """Serve no longer, and trust nothing that the rings still hold."""
        self._backend.let_go()
        self._end(reason, cause)
        self._switchboard.close(reason)

    def _hang_up(self) -> None:
        if self._channel.fileno() >= 0:
            self._loop.remove_reader(self._channel.fileno())
            self._channel.close()
        self._backend.close()
