"""One split virtqueue (virtio 1.2, section 2.7), seen from the device.

The driver side is hostile: every index and address is read from shared memory once, checked, and
used from the copy. A broken rule raises GuestViolation, and then nothing of the ring can be trusted.

Neither indirect descriptors nor event indices are negotiated: packets need two or three descriptors,
so both would only add surface. The used ring's flags stay 0, so the driver kicks for every batch and
no wake-up can be missed on our side.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from hypervisor.vsock.errors import FrontEndViolation, GuestViolation

if TYPE_CHECKING:
    from hypervisor.vsock.memory import GuestMemory

MAX_QUEUE_SIZE: Final = 32768

_DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, flags, next
_USED_ELEMENT: Final = struct.Struct("<II")  # head of the chain, bytes written
_FLAG_NEXT: Final = 1
_FLAG_WRITE: Final = 2
_FLAG_INDIRECT: Final = 4
_NO_INTERRUPT: Final = 1
_INDEX_MASK: Final = 0xFFFF
_BIG_ENDIAN: Final = sys.byteorder == "big"

# Positions of 16-bit words in the available and in the used ring.
_WORD_FLAGS: Final = 0
_WORD_INDEX: Final = 1
_WORD_RING: Final = 2


def _le16(value: int) -> int:
    """A 16-bit word between ring order (little-endian) and this machine's."""
    if _BIG_ENDIAN:
        return (value & 0xFF) << 8 | value >> 8
    return value


@dataclass(frozen=True, slots=True)
class RingAddresses:
    """Where the three parts of the ring lie, as virtual addresses of the VMM."""

    descriptors: int
    used: int
    available: int

    def check(self) -> None:
        """Raises FrontEndViolation unless aligned as section 2.7 demands (16, 4 and 2 bytes)."""
        if self.descriptors % 16 or self.used % 4 or self.available % 2:
            raise FrontEndViolation(f"ring addresses are not aligned: {self}")


class Vring:
    """Ring state between the VMM's settings and the pump.

    `live` is true between `attach()` and `detach()`. `position` is the next entry of the available
    ring, in the free-running 16-bit count that vhost-user calls the ring's base.
    """

    def __init__(self) -> None:
        self.size = 0
        self.addresses: RingAddresses | None = None
        self.position = 0
        self.live = False
        self._used_position = 0
        self._known = 0  # entries seen to be available from `position` on
        self._memory: GuestMemory | None = None
        self._call_fd = -1
        self._views: tuple[memoryview, ...] = ()
        # Uncontended; only its atomic operations are wanted, see _fence().
        self._lock = threading.Lock()

    @property
    def configured(self) -> bool:
        return self.addresses is not None and self.size > 0

    def attach(self, memory: GuestMemory) -> bool:
        """Resolve the ring in `memory`; False when it is not configured or a part of it lies outside."""
        self.detach()
        if self.addresses is None or not self.size:
            return False
        descriptors = memory.at_user_address(self.addresses.descriptors, 16 * self.size)
        available = memory.at_user_address(self.addresses.available, 4 + 2 * self.size)
        used = memory.at_user_address(self.addresses.used, 4 + 8 * self.size)
        if descriptors is None or available is None or used is None:
            return False
        self._memory = memory
        self._descriptors = descriptors
        # Whole 16-bit loads and stores: the other side must never see half an index.
        self._available = available.cast("H")
        self._used_words = used[:4].cast("H")
        self._used = used
        self._views = (self._available, self._used_words, descriptors, available, used)
        self._used_position = _le16(self._used_words[_WORD_INDEX])
        self._known = 0
        self.live = True
        return True

    def detach(self) -> None:
        """Stop touching guest memory; position and settings stay."""
        self.live = False
        self._memory = None
        self._known = 0
        for view in self._views:
            view.release()
        self._views = ()

    def set_call(self, fd: int) -> None:
        """Signal used buffers on `fd` from now on (owned by the ring; -1 for none)."""
        if self._call_fd >= 0:
            os.close(self._call_fd)
        self._call_fd = fd

    def available(self) -> int:
        """Number of chains ready to be taken. Raises GuestViolation on an impossible index."""
        if not self._known:
            if not self.live:
                return 0
            ready = (_le16(self._available[_WORD_INDEX]) - self.position) & _INDEX_MASK
            if ready > self.size:
                raise GuestViolation(f"the driver made {ready} buffers available in a ring of {self.size}")
            if ready:
                self._fence()  # the entries are read after the index that covers them
            self._known = ready
        return self._known

    def chain(self, ahead: int, *, writable: bool) -> tuple[int, list[memoryview], int]:
        """The chain `ahead` entries after the current one: (head, buffers, their total bytes).

        All buffers must be of the wanted direction; empty ones are skipped. The caller has checked
        `ahead < available()`. Raises GuestViolation.
        """
        assert self._memory is not None
        size = self.size
        slot = (self.position + ahead) & (size - 1)
        head = index = _le16(self._available[_WORD_RING + slot])
        buffers: list[memoryview] = []
        total = 0
        for _ in range(size):
            if index >= size:
                raise GuestViolation(f"descriptor {index} is outside a table of {size}")
            address, length, flags, following = _DESCRIPTOR.unpack_from(self._descriptors, index << 4)
            if flags & _FLAG_INDIRECT:
                raise GuestViolation("an indirect descriptor was not negotiated")
            if bool(flags & _FLAG_WRITE) is not writable:
                raise GuestViolation(f"descriptor {index} has the wrong direction")
            self._memory.collect(buffers, address, length)
            total += length
            if not flags & _FLAG_NEXT:
                return head, buffers, total
            index = following
        raise GuestViolation(f"descriptor chain from {head} is longer than the table of {size}")

    def advance(self, count: int = 1) -> None:
        """Take `count` chains off the available ring."""
        self.position = (self.position + count) & _INDEX_MASK
        self._known -= count

    def push(self, head: int, written: int) -> None:
        """Put a chain into the used ring; the driver sees it at the next `publish()`."""
        slot = self._used_position & (self.size - 1)
        _USED_ELEMENT.pack_into(self._used, 4 + 8 * slot, head, written)
        self._used_position = (self._used_position + 1) & _INDEX_MASK

    def publish(self) -> None:
        """Show the pushed chains to the driver and interrupt it if it wants to be."""
        self._fence()  # the elements are visible before the index that covers them
        self._used_words[_WORD_INDEX] = _le16(self._used_position)
        self._fence()  # the driver's flag is read after it can see the index
        if not _le16(self._available[_WORD_FLAGS]) & _NO_INTERRUPT:
            self.call()

    def call(self) -> None:
        """Interrupt the driver."""
        if self._call_fd >= 0:
            # A full counter means that a signal is already pending.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(self._call_fd, 1)

    def close(self) -> None:
        self.detach()
        self.set_call(-1)

    def _fence(self) -> None:
        """Keep memory accesses before this call before those after it.

        Python has no barrier of its own. Each lock operation is an atomic read-modify-write: on x86
        the first one is a full barrier already, on weaker machines an acquire (or release) alone is
        one-way, and a release followed by an acquire is not.
        """
        lock = self._lock
        lock.acquire()
        lock.release()
        lock.acquire()
        lock.release()
