"""What goes to the guest: the packets that flows owe it, and the bytes their hosts send.

Every packet needs a buffer of the rx ring, and bytes need credit too; nothing of the host is read before
both are there, and then straight into guest memory. Whoever finds no buffer waits in one queue. A kick
serves it from the front, a limited number of buffers each, so no stream starves another.

Methods that look at the ring raise GuestViolation.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from hypervisor.vsock.errors import GuestViolation
from hypervisor.vsock.flows import OWE_CREDIT, OWE_REQUEST, OWE_RESPONSE, OWE_SHUTDOWN, Flow, State, Wait
from hypervisor.vsock.packet import (
    COUNTER_MASK,
    HEADER_BYTES,
    HOST_CID,
    OP_CREDIT_UPDATE,
    OP_REQUEST,
    OP_RESPONSE,
    OP_RST,
    OP_RW,
    OP_SHUTDOWN,
    TYPE_STREAM,
    window,
    write_header,
)

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from hypervisor.vsock.vring import Vring

_MAX_REFUSALS: Final = 1024
_TURN: Final = 256  # rx buffers per turn of the event loop
_SHARE: Final = 16  # rx buffers per flow and turn
_MAX_PIECES: Final = 512  # per read; the system call takes 1024 (IOV_MAX)

_OWED_OPS: Final = (
    (OWE_REQUEST, OP_REQUEST),
    (OWE_RESPONSE, OP_RESPONSE),
    (OWE_CREDIT, OP_CREDIT_UPDATE),
    (OWE_SHUTDOWN, OP_SHUTDOWN),
)


class GuestFeed:
    """The rx ring and those who wait for it.

    `guarded(function, *args)` makes a callback that the event loop may run. `on_host_end(flow)` is called
    when a flow's host will send no more.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        guest_cid: int,
        ring: Vring,
        guarded: Callable[..., Callable[[], None]],
        on_host_end: Callable[[Flow], None],
    ) -> None:
        self.bytes_sent = 0
        self.refusals_dropped = 0
        self._loop = loop
        self._guest_cid = guest_cid
        self._ring = ring
        self._guarded = guarded
        self._on_host_end = on_host_end
        self._refusals: deque[tuple[int, int, int]] = deque()  # host port, guest port, type
        self._waiting: deque[Flow] = deque()
        self._scheduled = False

    # What is to be sent. These only take note; `run()` or `run_soon()` must follow.

    def refuse(self, host_port: int, guest_port: int, kind: int) -> None:
        """Send RST for a stream that is not, or no longer, in the table."""
        # A guest that lets this many pile up does not provide rx buffers; its loss.
        if len(self._refusals) < _MAX_REFUSALS:
            self._refusals.append((host_port, guest_port, kind))
        else:
            self.refusals_dropped += 1

    def owe(self, flow: Flow, bit: int) -> None:
        """Send the packet that `bit` (OWE_*) stands for."""
        flow.owes |= bit
        self.enqueue(flow)

    def enqueue(self, flow: Flow) -> None:
        """Look after `flow` as soon as there is a buffer for it."""
        if not flow.queued:
            flow.queued = True
            self._waiting.append(flow)

    def forget(self, flow: Flow) -> None:
        """`flow` sends nothing any more."""
        self.stop_reading(flow)
        flow.owes = 0
        if flow.queued:
            flow.queued = False
            self._waiting.remove(flow)

    def stop_reading(self, flow: Flow) -> None:
        self._pause(flow, Wait.END)

    def clear(self) -> None:
        """A new driver: it knows of no stream that could be refused."""
        self._refusals.clear()

    def run_soon(self) -> None:
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._guarded(self._run_scheduled))

    def _run_scheduled(self) -> None:
        self._scheduled = False
        self.run()

    # Sending.

    def run(self) -> None:
        """Fill rx buffers for those who wait; continues in a later turn when there is much to do."""
        spent = 0
        while (self._refusals or self._waiting) and spent < _TURN and self._ring.available():
            if self._refusals:
                host_port, guest_port, kind = self._refusals.popleft()
                self._put((HOST_CID, self._guest_cid, host_port, guest_port, 0, kind, OP_RST, 0, 0, 0))
                spent += 1
            else:
                flow = self._waiting.popleft()
                flow.queued = False
                spent += self._serve(flow)
        if spent:
            self._ring.publish()
        if spent >= _TURN:
            self.run_soon()

    def _serve(self, flow: Flow) -> int:
        """Do for `flow` what it waited for; the number of buffers used."""
        used = self._pay(flow)
        if flow.owes:
            self.enqueue(flow)
        elif flow.wait is Wait.RX_BUFFERS and flow.state is State.OPEN:
            used += self._pump(flow)
            if flow.wait is Wait.RX_BUFFERS and not flow.queued:
                flow.wait = Wait.NOTHING
                self._loop.add_reader(flow.sock, self._guarded(self._on_readable, flow))
        return used

    def _pay(self, flow: Flow) -> int:
        """Send the packets that `flow` owes while there are buffers; the number of them."""
        paid = 0
        for bit, op in _OWED_OPS:
            if flow.owes & bit and self._ring.available():
                self._put(self._header(flow, 0, op, flow.host_ended if op == OP_SHUTDOWN else 0))
                flow.owes &= ~bit
                paid += 1
        return paid

    def _on_readable(self, flow: Flow) -> None:
        if flow.owes:  # it waits for a buffer to send that in; its bytes come after
            self._pause(flow, Wait.RX_BUFFERS)
        elif self._pump(flow):
            self._ring.publish()
        self.run()

    def _pump(self, flow: Flow) -> int:
        """Read from the host into rx buffers what there is, up to one turn's share; the buffers used.

        Changes `flow.wait` when it cannot go on.
        """
        used = 0
        while used < _SHARE:
            credit = flow.credit()
            ready = self._ring.available()
            if not credit:
                self._pause(flow, Wait.CREDIT)
                break
            if not ready:
                self._pause(flow, Wait.RX_BUFFERS)
                self.enqueue(flow)
                break
            filled, more = self._read(flow, credit, min(ready, flow.burst))
            used += filled
            if not more:
                break
        return used

    def _read(self, flow: Flow, credit: int, chains: int) -> tuple[int, bool]:
        """One read from the host into at most `chains` buffers: how many were used, and is there more."""
        slots, target, room = self._room(credit, chains)
        try:
            count = flow.sock.recv_into(target[0]) if len(target) == 1 else flow.sock.recvmsg_into(target)[0]
        except BlockingIOError:
            flow.burst = 1
            return 0, False
        except OSError:  # closed with bytes of the guest unread
            count = 0
        if not count:
            self._on_host_end(flow)
            return 0, False
        filled, left = 0, count
        for head, buffers, share in slots:
            length = min(share, left)
            write_header(buffers, self._header(flow, length, OP_RW, 0))
            flow.sent = flow.sent + length & COUNTER_MASK
            self._ring.push(head, HEADER_BYTES + length)
            filled += 1
            left -= length
            if not left:
                break
        self._ring.advance(filled)
        self.bytes_sent += count
        whole = count == room
        # Looking at more buffers than a read fills is wasted: follow what the host sends.
        flow.burst = min(_SHARE, 4 * flow.burst) if whole else filled
        return filled, whole

    def _room(
        self, credit: int, chains: int
    ) -> tuple[list[tuple[int, list[memoryview], int]], list[memoryview], int]:
        """Where the next bytes may go: (head, buffers, payload bytes) of each chain, views, total bytes."""
        slots: list[tuple[int, list[memoryview], int]] = []
        target: list[memoryview] = []
        room = 0
        for ahead in range(chains):
            head, buffers, total = self._chain(ahead)
            share = min(total - HEADER_BYTES, credit - room)
            views = window(buffers, HEADER_BYTES, share)
            if len(target) + len(views) > _MAX_PIECES:
                if slots:
                    break
                del views[_MAX_PIECES:]
                share = sum(map(len, views))
            target += views
            room += share
            slots.append((head, buffers, share))
            if room == credit:
                break
        return slots, target, room

    def _header(self, flow: Flow, length: int, op: int, flags: int) -> tuple[int, ...]:
        """Header fields of a packet of `flow`, which tell the guest its newest credit."""
        flow.freed_told = flow.freed
        if op == OP_RW:
            flow.owes &= ~OWE_CREDIT
        addresses = (HOST_CID, self._guest_cid, flow.host_port, flow.guest_port)
        return (*addresses, length, TYPE_STREAM, op, flags, flow.buf_alloc, flow.freed)

    def _put(self, fields: tuple[int, ...]) -> None:
        """One packet without payload into the next buffer."""
        head, buffers, _ = self._chain(0)
        write_header(buffers, fields)
        self._ring.advance()
        self._ring.push(head, HEADER_BYTES)

    def _chain(self, ahead: int) -> tuple[int, list[memoryview], int]:
        head, buffers, total = self._ring.chain(ahead, writable=True)
        if total <= HEADER_BYTES:
            raise GuestViolation(f"rx buffer of {total} bytes; want more than a header of {HEADER_BYTES}")
        return head, buffers, total

    def _pause(self, flow: Flow, wait: Wait) -> None:
        if flow.wait is Wait.NOTHING:
            self._loop.remove_reader(flow.sock)
        flow.wait = wait
