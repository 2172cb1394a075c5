"""Every stream of one guest: the table of flows, what the guest's packets mean, and how flows end.

The bytes themselves are moved by `feed` (to the guest) and `outlet` (to the hosts).

Methods that look at the rings raise GuestViolation; the caller ends the device then.
"""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING, Final

from hypervisor.vsock.errors import DeviceBroken
from hypervisor.vsock.feed import GuestFeed
from hypervisor.vsock.flows import (
    OWE_CREDIT,
    OWE_REQUEST,
    OWE_RESPONSE,
    OWE_SHUTDOWN,
    Flow,
    State,
    Wait,
)
from hypervisor.vsock.hangups import Hangups
from hypervisor.vsock.outlet import HostOutlet
from hypervisor.vsock.packet import (
    HEADER_BYTES,
    HOST_CID,
    OP_CREDIT_REQUEST,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_RCV,
    SHUTDOWN_SEND,
    TYPE_STREAM,
    read_header,
    window,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from hypervisor.vsock.vring import Vring

MAX_FLOWS: Final = 1024
MAX_FLOWS_OF_GUEST: Final = 128
"""How many of them the guest may open: each takes two descriptors of this process, unasked."""
BUF_ALLOC: Final = 256 * 1024
"""Bytes a flow may hold for a slow host reader; what Linux's own vsock starts with."""
SMALL_BUF_ALLOC: Final = 32 * 1024
MAX_BUFFERED: Final = 64 * 1024 * 1024
"""Bytes all flows together may hold: flows beyond the first hundred or so get the small allowance."""

_MAX_LARGE_FLOWS: Final = (MAX_BUFFERED - MAX_FLOWS * SMALL_BUF_ALLOC) // (BUF_ALLOC - SMALL_BUF_ALLOC)
_TURN: Final = 32  # packets of the guest per turn of the event loop
_FIRST_PORT: Final = 49152
_LAST_PORT: Final = 0xFFFF_FFFE


class Switchboard:
    """The flows of one device. `guarded(function, *args)` makes a callback that the event loop may run."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        guest_cid: int,
        rx: Vring,
        tx: Vring,
        guarded: Callable[..., Callable[[], None]],
    ) -> None:
        self.dropped_packets = 0
        self.feed = GuestFeed(loop, guest_cid, rx, guarded, self._host_ended)
        self._loop = loop
        self._guest_cid = guest_cid
        self._tx = tx
        self._guarded = guarded
        self._outlet = HostOutlet(
            loop, guarded, on_taken=self._host_took, on_empty=self._backlog_empty, on_deaf=self._host_deaf
        )
        self._hangups = Hangups(loop, guarded, self._hung_up)
        self._flows: dict[tuple[int, int], Flow] = {}
        self._draining: set[Flow] = set()
        self._large_flows = 0
        self._flows_of_guest = 0
        self._listeners: dict[int, Callable[[socket.socket], None]] = {}
        self._next_port = _FIRST_PORT
        self._scheduled = False

    @property
    def flow_count(self) -> int:
        return len(self._flows) + len(self._draining)

    @property
    def bytes_to_host(self) -> int:
        return self._outlet.bytes_taken

    # For the host.

    def listen(self, port: int, on_connection: Callable[[socket.socket], None]) -> None:
        if port in self._listeners:
            raise OSError(errno.EADDRINUSE, f"vsock port {port} is already listened on")
        self._listeners[port] = on_connection

    def open(self, guest_port: int, sock: socket.socket, greeting: Callable[[int], bytes] | None) -> Flow:
        """Ask the guest for a stream to `guest_port`; `flow.answered` tells how it went.

        Takes over `sock`, which gets `greeting(host port)` before any byte of the guest. Raises
        ConnectionAbortedError, and leaves `sock` alone, when the guest has too many streams.
        """
        if not self._make_room():
            raise ConnectionAbortedError(f"the guest already has {MAX_FLOWS} vsock streams")
        flow = self._admit(self._free_port(guest_port), guest_port, sock, State.CONNECTING)
        if greeting is not None:
            flow.backlog += greeting(flow.host_port)
            flow.own_bytes = len(flow.backlog)
        flow.answered = self._loop.create_future()
        self.feed.owe(flow, OWE_REQUEST)
        self.feed.run_soon()
        return flow

    def abandon(self, flow: Flow) -> None:
        """Nobody waits for the answer to `open()` any more."""
        if flow.state in (State.CONNECTING, State.OPEN):
            if not flow.owes & OWE_REQUEST:
                self.feed.refuse(flow.host_port, flow.guest_port, TYPE_STREAM)
                self.feed.run_soon()
            self._drop(flow)

    def reset(self) -> None:
        """A new driver knows nothing of the old one's flows; connects start again."""
        self.feed.clear()
        for flow in list(self._flows.values()):
            if flow.state is State.CONNECTING:
                self.feed.owe(flow, OWE_REQUEST)
            else:
                self._retire(flow)

    def part(self, reason: str) -> None:
        """The guest is gone: fail what connects; hosts still get what the guest had sent them."""
        self._listeners.clear()
        for flow in list(self._flows.values()):
            if flow.state is State.CONNECTING:
                self._drop(flow, DeviceBroken(reason))
            else:
                self._retire(flow)

    def close(self, reason: str) -> None:
        """Close every flow at once."""
        self._listeners.clear()
        for flow in [*self._flows.values(), *self._draining]:
            self._drop(flow, DeviceBroken(reason))
        self._hangups.close()

    # Packets of the guest.

    def take_packets(self) -> None:
        """Handle what the driver put into the tx ring; continues in a later turn when there is much."""
        if self._take(_TURN) == _TURN and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._guarded(self._take_scheduled))

    def take_last_packets(self) -> None:
        """Handle what is in the tx ring now, all of it, before the ring stops."""
        self._take(self._tx.available())

    def _take_scheduled(self) -> None:
        self._scheduled = False
        self.take_packets()

    def _take(self, limit: int) -> int:
        tx = self._tx
        taken = 0
        while taken < limit and tx.available():
            head, buffers, total = tx.chain(0, writable=False)
            tx.advance()
            self._packet(buffers, total)
            tx.push(head, 0)
            taken += 1
        if taken:
            tx.publish()
            self.feed.run()
        return taken

    def _packet(self, buffers: list[memoryview], total: int) -> None:
        if total < HEADER_BYTES:
            self.dropped_packets += 1
            return
        fields = read_header(buffers)
        src_cid, dst_cid, guest_port, host_port, length, kind, op, flags, buf_alloc, fwd_cnt = fields
        if src_cid != self._guest_cid or dst_cid != HOST_CID:
            self.dropped_packets += 1
            return
        flow = self._flows.get((host_port, guest_port)) if kind == TYPE_STREAM else None
        if flow is None:
            if op == OP_REQUEST and kind == TYPE_STREAM and host_port in self._listeners:
                self._accept(host_port, guest_port, buf_alloc, fwd_cnt)
            elif op != OP_RST:
                self.feed.refuse(host_port, guest_port, kind)
            return
        flow.peer_buf_alloc = buf_alloc
        flow.peer_freed = fwd_cnt
        if op == OP_RST:
            self._retire(flow)
        elif flow.state is State.CONNECTING:
            if op == OP_RESPONSE:
                self._connected(flow)
            else:
                self._reject(flow)
        elif op == OP_RW:
            if length > total - HEADER_BYTES or not flow.take(length):
                self._reject(flow)
            elif not flow.deaf:
                # For the deaf nothing is freed: news of credit would only invite more of it.
                self._outlet.deliver(flow, window(buffers, HEADER_BYTES, length), length)
                self._pay_credit(flow)
        elif op == OP_SHUTDOWN:
            self._guest_shutdown(flow, flags & SHUTDOWN_BOTH)
        elif op == OP_CREDIT_REQUEST:
            self.feed.owe(flow, OWE_CREDIT)
        elif op != OP_CREDIT_UPDATE:
            self._reject(flow)
        if flow.wait is Wait.CREDIT and flow.credit():
            flow.wait = Wait.RX_BUFFERS
            self.feed.enqueue(flow)

    def _accept(self, host_port: int, guest_port: int, buf_alloc: int, fwd_cnt: int) -> None:
        ends = self._ends_for_guest()
        if ends is None:
            self.feed.refuse(host_port, guest_port, TYPE_STREAM)
            return
        ours, theirs = ends
        flow = self._admit(host_port, guest_port, ours, State.OPEN)
        self._flows_of_guest += 1
        flow.peer_buf_alloc = buf_alloc
        flow.peer_freed = fwd_cnt
        self.feed.owe(flow, OWE_RESPONSE)
        theirs.setblocking(False)
        try:
            self._listeners[host_port](theirs)
        except Exception as err:
            theirs.close()
            self._reject(flow)
            self._loop.call_exception_handler(
                {"message": f"the listener of vsock port {host_port} failed", "exception": err}
            )

    def _ends_for_guest(self) -> tuple[socket.socket, socket.socket] | None:
        """A socket pair for a stream that the guest opens, or None when it cannot have one."""
        if self._flows_of_guest >= MAX_FLOWS_OF_GUEST or not self._make_room():
            return None
        try:
            return socket.socketpair()
        except OSError:  # out of descriptors: it may try again
            return None

    def _connected(self, flow: Flow) -> None:
        flow.state = State.OPEN
        if flow.answered is not None and not flow.answered.done():  # else `abandon()` is about to follow
            flow.answered.set_result(None)
        self.feed.enqueue(flow)
        if flow.backlog:
            self._outlet.drain(flow)

    def _host_took(self, flow: Flow) -> None:
        self._pay_credit(flow)
        self.feed.run()

    def _pay_credit(self, flow: Flow) -> None:
        if flow.owes and flow.state in (State.OPEN, State.CLOSING):
            self.feed.enqueue(flow)

    def _backlog_empty(self, flow: Flow) -> None:
        if flow.state is State.DRAINING:
            self._drop(flow)
        elif flow.guest_ended & SHUTDOWN_SEND:
            _shutdown(flow.sock, socket.SHUT_WR)

    def _guest_shutdown(self, flow: Flow, flags: int) -> None:
        fresh = flags & ~flow.guest_ended
        flow.guest_ended |= flags
        if flow.guest_ended == SHUTDOWN_BOTH:
            self.feed.refuse(flow.host_port, flow.guest_port, TYPE_STREAM)  # the agreed answer
            self._retire(flow)
            return
        if flow.state is State.CLOSING:
            return
        if fresh & SHUTDOWN_RCV:
            self.feed.stop_reading(flow)
            _shutdown(flow.sock, socket.SHUT_RD)
            self._hangups.watch(flow)
        if fresh & SHUTDOWN_SEND and not flow.backlog:
            _shutdown(flow.sock, socket.SHUT_WR)

    # How flows end.

    def _host_ended(self, flow: Flow) -> None:
        """The host will send no more; it may have closed its socket altogether."""
        self.feed.stop_reading(flow)
        if self._hangups.watch(flow):
            self._host_closed(flow)
        else:
            flow.host_ended |= SHUTDOWN_SEND
            self.feed.owe(flow, OWE_SHUTDOWN)

    def _hung_up(self, flow: Flow) -> None:
        self._host_closed(flow)
        self.feed.run()

    def _host_closed(self, flow: Flow) -> None:
        """Nobody is on the host's end. The guest answers with RST when it has read all that was sent."""
        flow.state = State.CLOSING
        flow.deaf = True
        flow.host_ended = SHUTDOWN_BOTH
        self._release(flow)
        self.feed.owe(flow, OWE_SHUTDOWN)

    def _host_deaf(self, flow: Flow) -> None:
        """The host takes no more bytes, though it may have sent some that are still to be read."""
        flow.deaf = True
        self._outlet.forget(flow)
        if flow.state is State.DRAINING:
            self._drop(flow)
        elif flow.wait is Wait.END:
            self._host_closed(flow)
        else:
            flow.host_ended |= SHUTDOWN_RCV
            self.feed.owe(flow, OWE_SHUTDOWN)

    def _retire(self, flow: Flow) -> None:
        """The guest has forgotten `flow`; the host still gets what it is owed."""
        if flow.state is not State.OPEN or not flow.backlog:
            self._drop(flow)
            return
        del self._flows[flow.key]
        self.feed.forget(flow)
        flow.state = State.DRAINING
        self._draining.add(flow)
        _shutdown(flow.sock, socket.SHUT_RD)
        self._hangups.unwatch(flow)  # the backlog's writer will notice

    def _reject(self, flow: Flow) -> None:
        """The guest does not play by the rules: RST."""
        self.feed.refuse(flow.host_port, flow.guest_port, TYPE_STREAM)
        self._drop(flow)

    def _drop(self, flow: Flow, error: OSError | None = None) -> None:
        """Forget `flow` everywhere and close its socket; `error` is for whoever waits for it to open."""
        if flow.state is State.DRAINING:
            self._draining.remove(flow)
        else:
            del self._flows[flow.key]
        flow.state = State.GONE
        self._large_flows -= flow.buf_alloc == BUF_ALLOC
        self._flows_of_guest -= flow.answered is None
        self.feed.forget(flow)
        self._release(flow)
        if flow.answered is not None and not flow.answered.done():
            refusal = f"nothing listens on vsock port {flow.guest_port} of the guest"
            flow.answered.set_exception(error or ConnectionRefusedError(errno.ECONNREFUSED, refusal))

    def _release(self, flow: Flow) -> None:
        """Close the host's socket, once."""
        if flow.sock.fileno() >= 0:
            self.feed.stop_reading(flow)
            self._outlet.forget(flow)
            self._hangups.unwatch(flow)
            flow.sock.close()

    # Bookkeeping.

    def _make_room(self) -> bool:
        """Whether one more flow may exist. Gives up the oldest of the closing ones for it."""
        if self.flow_count < MAX_FLOWS:
            return True
        closing = (flow for flow in self._flows.values() if flow.state is State.CLOSING)
        oldest = next(closing, None)
        if oldest is not None:
            self._reject(oldest)
        return oldest is not None

    def _admit(self, host_port: int, guest_port: int, sock: socket.socket, state: State) -> Flow:
        large = self._large_flows < _MAX_LARGE_FLOWS
        self._large_flows += large
        sock.setblocking(False)
        flow = Flow(host_port, guest_port, sock, state, BUF_ALLOC if large else SMALL_BUF_ALLOC)
        self._flows[flow.key] = flow
        return flow

    def _free_port(self, guest_port: int) -> int:
        while True:
            port = self._next_port
            self._next_port = port + 1 if port < _LAST_PORT else _FIRST_PORT
            if port not in self._listeners and (port, guest_port) not in self._flows:
                return port


def _shutdown(sock: socket.socket, how: int) -> None:
    try:
        sock.shutdown(how)
    except OSError as err:
        if err.errno != errno.ENOTCONN:  # the host was faster
            raise
