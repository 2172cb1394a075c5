"""One stream between guest and host, and its credit (virtio 1.2, section 5.10.6.3).

Credit: each side tells how many bytes it is willing to hold (`buf_alloc`) and how many it has passed on
so far (`fwd_cnt`); the other may have at most `buf_alloc` bytes on the way. Counters are 32 bit and wrap.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from hypervisor.vsock.packet import COUNTER_MASK

if TYPE_CHECKING:
    import asyncio
    import socket


class State(Enum):
    CONNECTING = auto()
    """We asked the guest; it has not answered."""
    OPEN = auto()
    CLOSING = auto()
    """The host's end is closed, and the guest was told so; it has yet to agree."""
    DRAINING = auto()
    """The guest has forgotten the stream; the host has yet to take the backlog."""
    GONE = auto()


class Wait(Enum):
    """Why bytes of the host are not being read."""

    NOTHING = auto()
    """They are: the socket is watched."""
    RX_BUFFERS = auto()
    CREDIT = auto()
    END = auto()
    """There will be none any more, or nobody wants them."""


# Packets that a flow owes to the guest, one bit each: owing twice is owing once, so a flow's debt is bounded.
OWE_REQUEST: Final = 1
OWE_RESPONSE: Final = 2
OWE_CREDIT: Final = 4
OWE_SHUTDOWN: Final = 8


class Flow:
    """State of one stream. `sock` is the device's end of the host's socket pair."""

    __slots__ = (
        "answered",
        "backlog",
        "buf_alloc",
        "burst",
        "deaf",
        "freed",
        "freed_told",
        "guest_ended",
        "guest_port",
        "host_ended",
        "host_port",
        "owes",
        "own_bytes",
        "peer_buf_alloc",
        "peer_freed",
        "queued",
        "received",
        "sent",
        "sock",
        "state",
        "wait",
    )

    def __init__(
        self, host_port: int, guest_port: int, sock: socket.socket, state: State, buf_alloc: int
    ) -> None:
        self.host_port = host_port
        self.guest_port = guest_port
        self.sock = sock
        self.state = state
        self.wait = Wait.RX_BUFFERS
        self.answered: asyncio.Future[None] | None = None  # of a connect
        self.owes = 0
        self.queued = False  # in the queue for rx buffers
        self.burst = 1  # rx buffers that the last read was good for
        self.host_ended = 0  # SHUTDOWN_* flags, told to the guest or owed
        self.guest_ended = 0  # SHUTDOWN_* flags, as told by the guest
        self.deaf = False  # the host takes no more bytes
        self.backlog = bytearray()  # for the host, which has yet to take it
        self.own_bytes = 0  # how many at the backlog's front are ours, not the guest's

        self.buf_alloc = buf_alloc
        self.received = 0
        self.freed = 0
        self.freed_told = 0
        self.peer_buf_alloc = 0
        self.peer_freed = 0
        self.sent = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.host_port, self.guest_port

    def credit(self) -> int:
        """Bytes we may send to the guest now."""
        # A guest that claims to have freed what we never sent only blocks itself: the difference wraps.
        return max(0, self.peer_buf_alloc - (self.sent - self.peer_freed & COUNTER_MASK))

    def take(self, count: int) -> bool:
        """Account for `count` bytes from the guest; False when it never had the credit for them."""
        if count > self.buf_alloc - (self.received - self.freed & COUNTER_MASK):
            return False
        self.received = self.received + count & COUNTER_MASK
        return True

    def free(self, count: int) -> None:
        """The host took `count` bytes. Owes the guest news of it before it can run dry."""
        ours = min(count, self.own_bytes)
        self.own_bytes -= ours
        count -= ours
        self.freed = self.freed + count & COUNTER_MASK
        if (self.freed - self.freed_told & COUNTER_MASK) * 4 >= self.buf_alloc:
            self.owes |= OWE_CREDIT
