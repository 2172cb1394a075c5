"""What the front end's requests do: negotiate features, map memory, start and stop rings.

The back-end of a vhost-user connection, without the socket (see `vhost_user`) and without any idea of
packets: it tells a `Device` when rings come and go. Rings 0 and 1 are virtio-vsock's rx and tx; ring 2
is the event queue, which QEMU keeps to itself and other front ends may hand over.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING, Final, Protocol

from hypervisor.vsock.errors import FrontEndViolation
from hypervisor.vsock.memory import GuestMemory, RegionSpec
from hypervisor.vsock.vhost_user import (
    F_PROTOCOL_FEATURES,
    MAX_MESSAGE_FDS,
    NO_FD,
    PROTOCOL_F_CONFIG,
    PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    PROTOCOL_F_MQ,
    PROTOCOL_F_REPLY_ACK,
    PROTOCOL_F_RESET_DEVICE,
    Message,
    Request,
)
from hypervisor.vsock.vring import MAX_QUEUE_SIZE, RingAddresses, Vring

if TYPE_CHECKING:
    from collections.abc import Callable

RING_COUNT: Final = 3
MAX_MEMORY_SLOTS: Final = 64

_F_VERSION_1: Final = 1 << 32
FEATURES: Final = _F_VERSION_1 | F_PROTOCOL_FEATURES
# Memory slots one by one: a whole table ends at 8 regions, too few for a guest with hot-plugged memory.
PROTOCOL_FEATURES: Final = (
    PROTOCOL_F_MQ
    | PROTOCOL_F_REPLY_ACK
    | PROTOCOL_F_CONFIG
    | PROTOCOL_F_RESET_DEVICE
    | PROTOCOL_F_CONFIGURE_MEM_SLOTS
)

_U64: Final = struct.Struct("=Q")
_RING_STATE: Final = struct.Struct("=II")  # ring, number
_RING_ADDRESS: Final = struct.Struct("=IIQQQQ")  # ring, flags, descriptors, used, available, log
_REGION: Final = struct.Struct("=QQQQ")  # guest address, size, user address, mmap offset
_TABLE_HEAD: Final = struct.Struct("=II")  # regions, padding
_SLOT: Final = struct.Struct("=QQQQQ")  # padding, then a region
_CONFIG_HEAD: Final = struct.Struct("=III")  # offset, size, flags


class Device(Protocol):
    """What the back-end drives. None of the calls may raise."""

    def ring_started(self, index: int, kick_fd: int) -> None:
        """Ring `index` is live; `kick_fd` becomes readable when the driver adds buffers."""

    def ring_stopping(self, index: int, kick_fd: int) -> None:
        """Last chance to look at ring `index`, if it is still live. Called once for each start."""

    def driver_reset(self) -> None:
        """A new driver took over: what the old one had open is gone."""


class _Ring:
    """Settings of one ring that the pump has no business with."""

    def __init__(self) -> None:
        self.vring = Vring()
        self.kick_fd = -1
        self.error_fd = -1
        self.enabled = False
        self.serving = False
        self.stopped_at: tuple[RingAddresses | None, int] | None = None


class Backend:
    """State of one vhost-user connection; `handle()` gives the payload of the answer, if there is one."""

    def __init__(self, device: Device, guest_cid: int) -> None:
        self.memory = GuestMemory()
        self._device = device
        self._config = struct.pack("<Q", guest_cid)
        self._rings = tuple(_Ring() for _ in range(RING_COUNT))
        self._features = 0
        self._protocol_features = 0
        self._halted = False
        self._handlers: dict[int, Callable[[Message], bytes | None]] = {
            Request.GET_FEATURES: lambda _: _U64.pack(FEATURES),
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: lambda _: None,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: lambda _: _U64.pack(PROTOCOL_FEATURES),
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: lambda _: _U64.pack(RING_COUNT),
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_CONFIG: self._get_config,
            Request.RESET_DEVICE: self._reset_device,
            Request.GET_MAX_MEM_SLOTS: lambda _: _U64.pack(MAX_MEMORY_SLOTS),
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
        }

    def vring(self, index: int) -> Vring:
        return self._rings[index].vring

    def handle(self, message: Message) -> bytes | None:
        """Do what `message` says; its descriptors stay the caller's to close unless taken.

        Returns the payload to reply with, or None. A request we do not know fails where the front end
        asked for an acknowledgement and is ignored elsewhere. Raises FrontEndViolation.
        """
        handler = self._handlers.get(message.request)
        failed = handler is None
        if handler is not None:
            answer = handler(message)
            if answer is not None:
                return answer
        if message.need_reply and self._protocol_features & PROTOCOL_F_REPLY_ACK:
            return _U64.pack(failed)
        return None

    def let_go(self) -> None:
        """Touch no ring any more until it is resolved again."""
        for ring in self._rings:
            ring.vring.detach()

    def halt(self) -> None:
        """Stop all rings for good and report an error on each. Requests are still answered."""
        self._halted = True
        for index, ring in enumerate(self._rings):
            self._stop(index)
            if ring.error_fd >= 0:
                os.eventfd_write(ring.error_fd, 1)

    def close(self) -> None:
        """Release every descriptor and mapping. Idempotent."""
        self._halted = True
        for index, ring in enumerate(self._rings):
            self._stop(index)
            ring.vring.close()
            ring.kick_fd = _replaced(ring.kick_fd, -1)
            ring.error_fd = _replaced(ring.error_fd, -1)
        self.memory.close()

    # Rings: `_refresh()` is the one place that decides whether a ring is served.

    def _refresh(self, index: int, *, may_wait: bool = False) -> None:
        """Serve the ring if everything for it is there. Raises FrontEndViolation if it lies in no memory.

        `may_wait` is for a memory table in the middle of a change: the ring stops until it can be found.
        """
        ring = self._rings[index]
        # Without protocol features there is no SET_VRING_ENABLE, and a ring starts enabled.
        enabled = ring.enabled or not self._features & F_PROTOCOL_FEATURES
        wanted = enabled and ring.kick_fd >= 0 and not self._halted
        if not wanted or not ring.vring.attach(self.memory):
            self._stop(index)
            if wanted and ring.vring.configured and not may_wait:
                raise FrontEndViolation(f"ring {index} is not inside the memory table")
        elif not ring.serving:
            self._notice_new_driver(ring)
            ring.serving = True
            self._device.ring_started(index, ring.kick_fd)

    def _stop(self, index: int) -> None:
        ring = self._rings[index]
        if ring.serving:
            ring.serving = False
            self._device.ring_stopping(index, ring.kick_fd)
        ring.vring.detach()

    def _notice_new_driver(self, ring: _Ring) -> None:
        """Tell a paused VM from a driver that starts over, as `ring` starts again.

        The VMM stops the rings in both cases. A paused one goes on where it was; a new driver begins
        with other positions, and often elsewhere.
        """
        stop, ring.stopped_at = ring.stopped_at, None
        if stop is not None and stop != (ring.vring.addresses, ring.vring.position):
            for other in self._rings:  # once is enough for all of them
                other.stopped_at = None
            self._device.driver_reset()

    def _ring_of(self, index: int) -> _Ring:
        if index >= RING_COUNT:
            raise FrontEndViolation(f"ring {index} does not exist; the device has {RING_COUNT}")
        return self._rings[index]

    def _set_vring_num(self, message: Message) -> None:
        index, size = message.unpack(_RING_STATE)
        ring = self._ring_of(index)
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise FrontEndViolation(
                f"ring {index} of {size} entries; want a power of two to {MAX_QUEUE_SIZE}"
            )
        self._stop(index)
        ring.vring.size = size
        self._refresh(index)

    def _set_vring_addr(self, message: Message) -> None:
        index, _flags, descriptors, used, available, _log = message.unpack(_RING_ADDRESS)
        ring = self._ring_of(index)
        addresses = RingAddresses(descriptors, used, available)
        addresses.check()
        ring.vring.addresses = addresses
        self._refresh(index)

    def _set_vring_base(self, message: Message) -> None:
        index, position = message.unpack(_RING_STATE)
        ring = self._ring_of(index)
        self._stop(index)
        ring.vring.position = position & 0xFFFF
        self._refresh(index)

    def _get_vring_base(self, message: Message) -> bytes:
        index, _ = message.unpack(_RING_STATE)
        ring = self._ring_of(index)
        self._stop(index)
        ring.kick_fd = _replaced(ring.kick_fd, -1)
        ring.stopped_at = (ring.vring.addresses, ring.vring.position)
        return _RING_STATE.pack(index, ring.vring.position)

    def _set_vring_kick(self, message: Message) -> None:
        index, fd = self._ring_fd(message)
        if fd < 0:
            raise FrontEndViolation(f"ring {index} is to be polled; this device only takes kicks")
        ring = self._rings[index]
        self._stop(index)
        ring.kick_fd = _replaced(ring.kick_fd, fd)
        self._refresh(index)

    def _set_vring_call(self, message: Message) -> None:
        index, fd = self._ring_fd(message)
        self._rings[index].vring.set_call(fd)

    def _set_vring_err(self, message: Message) -> None:
        index, fd = self._ring_fd(message)
        ring = self._rings[index]
        ring.error_fd = _replaced(ring.error_fd, fd)

    def _ring_fd(self, message: Message) -> tuple[int, int]:
        """Ring and descriptor of SET_VRING_KICK, _CALL, _ERR; the descriptor is -1 or the caller's."""
        (value,) = message.unpack(_U64)
        index = value & 0xFF
        self._ring_of(index)
        if value & NO_FD:
            return index, -1
        return index, message.take_fd()

    def _set_vring_enable(self, message: Message) -> None:
        index, enabled = message.unpack(_RING_STATE)
        self._ring_of(index).enabled = bool(enabled)
        self._refresh(index)

    # Device-wide requests.

    def _set_features(self, message: Message) -> None:
        (features,) = message.unpack(_U64)
        if features & ~FEATURES:
            raise FrontEndViolation(f"features {features:#x} were not offered; we have {FEATURES:#x}")
        self._features = features
        for index in range(RING_COUNT):
            self._refresh(index)

    def _set_protocol_features(self, message: Message) -> None:
        (features,) = message.unpack(_U64)
        if features & ~PROTOCOL_FEATURES:
            raise FrontEndViolation(
                f"protocol features {features:#x} were not offered; we have {PROTOCOL_FEATURES:#x}"
            )
        self._protocol_features = features

    def _get_config(self, message: Message) -> bytes:
        offset, size, flags = message.unpack(_CONFIG_HEAD)
        if offset + size > len(self._config):
            return b""  # the protocol's way of saying no
        return _CONFIG_HEAD.pack(offset, size, flags) + self._config[offset : offset + size]

    def _reset_owner(self, _: Message) -> None:
        """Deprecated; the protocol suggests to disable all rings."""
        for index, ring in enumerate(self._rings):
            ring.enabled = False
            self._stop(index)

    def _reset_device(self, message: Message) -> None:
        self._reset_owner(message)
        for ring in self._rings:
            ring.stopped_at = None
        self._device.driver_reset()

    # Memory. Rings that cannot be resolved in the new table wait for one in which they can.

    def _set_mem_table(self, message: Message) -> None:
        count, _ = message.unpack(_TABLE_HEAD)
        if count > MAX_MESSAGE_FDS or len(message.fds) != count:
            raise FrontEndViolation(f"memory table of {count} regions with {len(message.fds)} descriptors")
        if len(message.payload) < _TABLE_HEAD.size + count * _REGION.size:
            raise FrontEndViolation(f"memory table of {count} regions in {len(message.payload)} bytes")
        self.let_go()
        self.memory.close()
        for number, fd in enumerate(message.fds):
            fields = _REGION.unpack_from(message.payload, _TABLE_HEAD.size + number * _REGION.size)
            self.memory.add(RegionSpec(*fields), fd)
        self._take_up()

    def _add_mem_reg(self, message: Message) -> None:
        _, *fields = message.unpack(_SLOT)
        if len(self.memory) >= MAX_MEMORY_SLOTS:
            raise FrontEndViolation(f"more than {MAX_MEMORY_SLOTS} memory regions")
        if len(message.fds) != 1:
            raise FrontEndViolation(f"memory region with {len(message.fds)} descriptors; want 1")
        self.memory.add(RegionSpec(*fields), message.fds[0])
        self._take_up()

    def _rem_mem_reg(self, message: Message) -> None:
        _, *fields = message.unpack(_SLOT)
        self.let_go()
        self.memory.remove(RegionSpec(*fields))
        self._take_up()

    def _take_up(self) -> None:
        for index in range(RING_COUNT):
            self._refresh(index, may_wait=True)


def _replaced(old: int, new: int) -> int:
    if old >= 0:
        os.close(old)
    return new
