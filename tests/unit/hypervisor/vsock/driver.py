"""The other side of the vsock device for tests: a VMM that speaks vhost-user and a guest driver with rings.

Everything is written down from the specifications (virtio 1.2, QEMU's vhost-user document) and shares no code
with the device, so a wrong number on either side shows. The guest may lie: every method takes what a hostile
one would send.
"""

from __future__ import annotations

import array
import asyncio
import mmap
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hypervisor.vsock.user import UserVsock

GUEST_BASE = 0x1000_0000
USER_BASE = 0x7F12_3400_0000
MEMORY_BYTES = 4 << 20
MEMFD_NAME = "vsock-fake-guest"

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RX, TX, EVENT = 0, 1, 2
F_VERSION_1, F_PROTOCOL_FEATURES = 1 << 32, 1 << 30
NEXT, WRITE, INDIRECT = 1, 2, 4

# Requests of the vhost-user document, by number.
VU = {
    "GET_FEATURES": 1,
    "SET_FEATURES": 2,
    "SET_OWNER": 3,
    "RESET_OWNER": 4,
    "SET_MEM_TABLE": 5,
    "SET_VRING_NUM": 8,
    "SET_VRING_ADDR": 9,
    "SET_VRING_BASE": 10,
    "GET_VRING_BASE": 11,
    "SET_VRING_KICK": 12,
    "SET_VRING_CALL": 13,
    "SET_VRING_ERR": 14,
    "GET_PROTOCOL_FEATURES": 15,
    "SET_PROTOCOL_FEATURES": 16,
    "GET_QUEUE_NUM": 17,
    "SET_VRING_ENABLE": 18,
    "GET_CONFIG": 24,
    "RESET_DEVICE": 34,
    "GET_MAX_MEM_SLOTS": 36,
    "ADD_MEM_REG": 37,
    "REM_MEM_REG": 38,
}
REPLIES = {
    "GET_FEATURES",
    "GET_PROTOCOL_FEATURES",
    "GET_VRING_BASE",
    "GET_QUEUE_NUM",
    "GET_CONFIG",
    "GET_MAX_MEM_SLOTS",
}


async def soon(condition: Callable[[], bool]) -> None:
    """Give the event loop turns until `condition()`, but not for ever."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it did not happen within 10 000 turns of the event loop")


async def exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes from a host's socket; not one more is read."""
    data = b""
    while len(data) < count:
        more = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
        if not more:
            raise EOFError(f"the stream ended after {len(data)} bytes of {count}")
        data += more
    return data


@dataclass(frozen=True)
class Packet:
    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    payload: bytes = b""


def header(
    op: int,
    src_port: int,
    dst_port: int,
    length: int = 0,
    *,
    flags: int = 0,
    buf_alloc: int = 65536,
    fwd_cnt: int = 0,
    src_cid: int = 3,
    dst_cid: int = 2,
    type: int = 1,
) -> bytes:
    return struct.pack(
        "<QQIIIHHIII", src_cid, dst_cid, src_port, dst_port, length, type, op, flags, buf_alloc, fwd_cnt
    )


class Memory:
    """Guest memory in a memfd, with a bump allocator; its region starts `first` bytes into the file."""

    def __init__(self, size: int = MEMORY_BYTES, *, first: int = 0) -> None:
        self.fd = os.memfd_create(MEMFD_NAME)
        os.ftruncate(self.fd, size)
        self.map = mmap.mmap(self.fd, size)
        self.size = size
        self.first = first
        self._next = first

    def allocate(self, size: int, align: int = 16) -> int:
        start = -(-self._next // align) * align
        self._next = start + size
        assert self._next <= self.size, "the fake guest is out of memory"
        return start

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


class Ring:
    """The driver's half of a split virtqueue; offsets are into the guest's memory."""

    def __init__(self, memory: Memory, size: int) -> None:
        self.memory = memory
        self.size = size
        self.desc = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(6 + 2 * size, 2)
        self.used = memory.allocate(6 + 8 * size, 4)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.err = os.eventfd(0, os.EFD_NONBLOCK)
        self.reset()

    def reset(self) -> None:
        """Back to an empty ring, as a driver sets it up."""
        end = self.used + 6 + 8 * self.size
        self.memory.map[self.desc : end] = bytes(end - self.desc)
        self.free = deque(range(self.size))
        self.chains: dict[int, list[int]] = {}
        self.avail_index = 0
        self.used_index = 0

    def describe(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        struct.pack_into("<QIHH", self.memory.map, self.desc + 16 * index, address, length, flags, following)

    def offer(self, head: int) -> None:
        """Make `head` available, whatever it is."""
        slot = self.avail_index % self.size
        struct.pack_into("<H", self.memory.map, self.avail + 4 + 2 * slot, head)
        self.avail_index = (self.avail_index + 1) & 0xFFFF
        self.set_avail_index(self.avail_index)

    def set_avail_index(self, value: int) -> None:
        struct.pack_into("<H", self.memory.map, self.avail + 2, value)

    def set_no_interrupt(self, wanted: bool) -> None:
        struct.pack_into("<H", self.memory.map, self.avail, int(wanted))

    def add(self, pieces: Sequence[tuple[int, int]], flags: int = 0) -> int:
        """One chain of (guest address, length) pieces; returns its head. Needs `ring_kick()` to be noticed."""
        indices = [self.free.popleft() for _ in pieces]
        for place, (address, length) in enumerate(pieces):
            last = place == len(pieces) - 1
            following = 0 if last else indices[place + 1]
            self.describe(indices[place], address, length, flags | (0 if last else NEXT), following)
        self.chains[indices[0]] = indices
        self.offer(indices[0])
        return indices[0]

    def ring_kick(self) -> None:
        os.eventfd_write(self.kick, 1)

    @property
    def device_index(self) -> int:
        return int(struct.unpack_from("<H", self.memory.map, self.used + 2)[0])

    def reap(self) -> list[tuple[int, int]]:
        """(head, bytes written) of the chains the device has used since the last time."""
        done = []
        while self.used_index != self.device_index:
            slot = self.used_index % self.size
            head, length = struct.unpack_from("<II", self.memory.map, self.used + 4 + 8 * slot)
            self.free.extend(self.chains.pop(head))
            done.append((head, length))
            self.used_index = (self.used_index + 1) & 0xFFFF
        return done

    def close(self) -> None:
        for fd in (self.kick, self.call, self.err):
            os.close(fd)


class FrontEnd:
    """The VMM's end of the vhost-user connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.setblocking(False)
        self.loop = asyncio.get_running_loop()
        self.acknowledged = False

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], control)

    def send(self, request: str | int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 1) -> None:
        number = VU[request] if isinstance(request, str) else request
        self.send_raw(struct.pack("=III", number, flags, len(payload)) + payload, fds)

    async def exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = await self.loop.sock_recv(self.sock, count - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    async def answer(self, number: int) -> bytes:
        request, flags, size = struct.unpack("=III", await self.exactly(12))
        assert (request, flags) == (number, 5), "version 1 and the reply bit"
        return await self.exactly(size)

    async def ask(self, request: str | int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """Send and wait until it was handled: for the reply, or for the acknowledgement."""
        number = VU[request] if isinstance(request, str) else request
        if request in REPLIES:
            self.send(number, payload, fds)
            return await self.answer(number)
        if self.acknowledged:
            self.send(number, payload, fds, flags=1 | 8)
            return await self.answer(number)
        self.send(number, payload, fds)
        return b""

    async def negotiate(self, *, protocol_features: int = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15) -> None:
        await self.ask("GET_FEATURES")
        await self.ask("GET_PROTOCOL_FEATURES")
        await self.ask("SET_PROTOCOL_FEATURES", struct.pack("=Q", protocol_features))
        self.acknowledged = bool(protocol_features & 1 << 3)
        await self.ask("SET_OWNER")
        await self.ask("SET_FEATURES", struct.pack("=Q", F_VERSION_1 | F_PROTOCOL_FEATURES))

    async def set_memory(self, memory: Memory) -> None:
        first = memory.first
        region = struct.pack("=QQQQ", GUEST_BASE + first, memory.size - first, USER_BASE + first, first)
        await self.ask("SET_MEM_TABLE", struct.pack("=II", 1, 0) + region, [memory.fd])

    async def start(self, index: int, ring: Ring, base: int = 0, *, size: int | None = None) -> None:
        user = USER_BASE
        await self.ask("SET_VRING_NUM", struct.pack("=II", index, size or ring.size))
        await self.ask("SET_VRING_BASE", struct.pack("=II", index, base))
        addresses = (user + ring.desc, user + ring.used, user + ring.avail)
        await self.ask("SET_VRING_ADDR", struct.pack("=IIQQQQ", index, 0, *addresses, 0))
        await self.ask("SET_VRING_CALL", struct.pack("=Q", index), [ring.call])
        await self.ask("SET_VRING_ERR", struct.pack("=Q", index), [ring.err])
        await self.ask("SET_VRING_KICK", struct.pack("=Q", index), [ring.kick])
        await self.ask("SET_VRING_ENABLE", struct.pack("=II", index, 1))

    async def stop(self, index: int) -> int:
        """Stop a ring; its base."""
        ring, base = struct.unpack("=II", await self.ask("GET_VRING_BASE", struct.pack("=II", index, 0)))
        assert ring == index
        return int(base)

    def close(self) -> None:
        self.sock.close()


class Guest:
    """A VMM with a guest whose driver is well-behaved, unless told otherwise."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        ring_size: int = 128,
        rx_bytes: int = 4096,
        rx_split: Sequence[int] = (),
        first: int = 0,
    ) -> None:
        self.vmm = FrontEnd(sock)
        self.memory = Memory(first=first)
        self.rx = Ring(self.memory, ring_size)
        self.tx = Ring(self.memory, ring_size)
        self.rx_bytes = rx_bytes
        self.rx_split = tuple(rx_split)
        self.repost = True
        self.packets: deque[Packet] = deque()
        self.interrupts = 0
        self._rx_pool = [self.memory.allocate(rx_bytes) for _ in range(ring_size // (len(rx_split) or 1))]
        self._rx_at: dict[int, int] = {}
        self._tx_at = self.memory.allocate(512 * 1024)
        self._changed = asyncio.Event()
        self.vmm.loop.add_reader(self.rx.call, self._on_call, self.rx.call)
        self.vmm.loop.add_reader(self.tx.call, self._on_call, self.tx.call)

    async def boot(self, *, rx_buffers: int | None = None) -> Guest:
        """Everything up to a running driver."""
        await self.vmm.negotiate()
        await self.vmm.set_memory(self.memory)
        await self.start_rings()
        self.post(len(self._rx_pool) if rx_buffers is None else rx_buffers)
        return self

    async def start_rings(self, bases: tuple[int, int] = (0, 0)) -> None:
        await self.vmm.start(RX, self.rx, bases[RX])
        await self.vmm.start(TX, self.tx, bases[TX])

    async def stop_rings(self) -> tuple[int, int]:
        return await self.vmm.stop(RX), await self.vmm.stop(TX)

    def reset_driver(self) -> None:
        """Forget everything the old driver knew."""
        self._rx_pool.extend(self._rx_at.values())
        self._rx_at.clear()
        self.packets.clear()
        self.rx.reset()
        self.tx.reset()

    def post(self, count: int) -> None:
        """Give the device `count` rx buffers."""
        for _ in range(count):
            offset = self._rx_pool.pop()
            pieces, start = [], GUEST_BASE + offset
            for part in self.rx_split or (self.rx_bytes,):
                pieces.append((start, part))
                start += part
            self._rx_at[self.rx.add(pieces, WRITE)] = offset
        if count:
            self.rx.ring_kick()

    def send(
        self,
        op: int,
        src_port: int,
        dst_port: int,
        payload: bytes = b"",
        *,
        split: Sequence[int] = (),
        length: int | None = None,
        kick: bool = True,
        **fields: int,
    ) -> int:
        """One packet into the tx ring: a header descriptor and data descriptors of `split` bytes each."""
        size = len(payload) if length is None else length
        return self.send_raw(
            header(op, src_port, dst_port, size, **fields) + payload, (44, *(split or (len(payload),))), kick
        )

    def send_raw(self, data: bytes, split: Sequence[int] = (), kick: bool = True) -> int:
        self.tx.reap()
        if self._tx_at + len(data) > self.memory.size:
            self._tx_at = self.memory.size - 512 * 1024
        start = self._tx_at
        self.memory.map[start : start + len(data)] = data
        self._tx_at += len(data)
        pieces, at = [], start
        for part in split or (len(data),):
            if part:
                pieces.append((GUEST_BASE + at, part))
            at += part
        head = self.tx.add(pieces)
        if kick:
            self.tx.ring_kick()
        return head

    async def packet(self, op: int | None = None) -> Packet:
        """The next packet of the device, which must be an `op`."""
        await self.until(lambda: bool(self.packets))
        got = self.packets.popleft()
        assert op is None or got.op == op, got
        return got

    async def stream(self, count: int) -> bytes:
        """`count` bytes of payload, whatever packets they come in."""
        data = b""
        while len(data) < count:
            data += (await self.packet(RW)).payload
        return data

    async def until(self, condition: Callable[[], bool]) -> None:
        """Collect packets until `condition()`; it is looked at after every interrupt."""
        while not condition():
            self._changed.clear()
            self.collect()
            if not condition():
                await self._changed.wait()

    async def changed(self) -> None:
        """Wait for the next interrupt."""
        self._changed.clear()
        await self._changed.wait()

    async def tx_used(self) -> None:
        """Wait until the device has taken everything from the tx ring."""
        while self.tx.device_index != self.tx.avail_index:
            await self.changed()

    def collect(self) -> None:
        """Take the packets out of the used rx buffers, and give the buffers back."""
        reposted = 0
        for head, written in self.rx.reap():
            offset = self._rx_at.pop(head)
            data = self.memory.map[offset : offset + written]
            fields = struct.unpack_from("<QQIIIHHIII", data)
            self.packets.append(Packet(*(*fields, bytes(data[44:]))))
            assert fields[4] == written - 44
            self._rx_pool.append(offset)
            reposted += 1
        if self.repost:
            self.post(reposted)

    async def accept(self, *, buf_alloc: int = 65536) -> Packet:
        """Answer the device's next REQUEST with RESPONSE; the request."""
        request = await self.packet(REQUEST)
        self.send(RESPONSE, request.dst_port, request.src_port, buf_alloc=buf_alloc)
        return request

    def close(self) -> None:
        for ring in (self.rx, self.tx):
            self.vmm.loop.remove_reader(ring.call)
            ring.close()
        self.vmm.close()
        self.memory.close()

    def _on_call(self, fd: int) -> None:
        os.eventfd_read(fd)
        self.interrupts += 1
        self._changed.set()


async def connected(device: UserVsock, guest: Guest) -> tuple[socket.socket, int]:
    """A stream from the host to the guest's port 1024: the host's end, and the port that it comes from."""
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.accept()
    return await connecting, request.src_port
