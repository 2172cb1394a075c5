"""Cost of the user-space vsock device: bytes per second and per second of CPU, without a VM.

The fake guest of the unit tests plays the driver, in this process and on the same event loop. Its own work is
kept small (descriptors and headers are written once, payloads are never looked at) but is part of every number, so
the device is a little better than shown. The floor is what the same bytes cost through one plain socket
pair in the same run: no pump can do better, since every byte of the device crosses such a pair as well.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass

from hypervisor.vsock.user import UserVsock
from tests.unit.hypervisor.vsock.driver import GUEST_BASE, REQUEST, RESPONSE, RW, Guest, header

CHUNK_BYTES = 64 * 1024
PORT = 1024


@dataclass
class Rate:
    """`count` bytes in wall and CPU seconds of this process."""

    count: int
    seconds: float
    cpu_s: float

    @property
    def mb_per_s(self) -> float:
        return round(self.count / self.seconds / 1e6, 1)

    @property
    def mb_per_cpu_s(self) -> float:
        return round(self.count / self.cpu_s / 1e6, 1)


class Stopwatch:
    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def rate(self, count: int) -> Rate:
        return Rate(count, time.perf_counter() - self._wall, time.process_time() - self._cpu)


async def _read(sock: socket.socket, total: int) -> None:
    loop = asyncio.get_running_loop()
    buffer = bytearray(4 * CHUNK_BYTES)
    while total > 0:
        count = await loop.sock_recv_into(sock, buffer)
        if not count:
            raise EOFError(f"{total} bytes are missing")
        total -= count


async def _write(sock: socket.socket, total: int) -> None:
    loop = asyncio.get_running_loop()
    chunk = bytes(CHUNK_BYTES)
    while total > 0:
        await loop.sock_sendall(sock, chunk[:total])
        total -= CHUNK_BYTES


async def floor(total: int) -> Rate:
    """The bytes through one socket pair, written and read as the clients of the device do it."""
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
    watch = Stopwatch()
    await asyncio.gather(_write(ours, total), _read(theirs, total))
    rate = watch.rate(total)
    ours.close()
    theirs.close()
    return rate


async def _connected(device: UserVsock, guest: Guest, buf_alloc: int) -> tuple[socket.socket, int]:
    connecting = asyncio.create_task(device.connect(PORT))
    request = await guest.packet(REQUEST)
    guest.send(RESPONSE, PORT, request.src_port, buf_alloc=buf_alloc)
    return await connecting, request.src_port


async def to_host(device: UserVsock, guest: Guest, total: int) -> Rate:
    """The guest sends packets of 64 KiB in two descriptors, as Linux does, within its credit."""
    sock, port = await _connected(device, guest, 1 << 20)
    freed, sent, slots = 0, 0, 3
    payload = bytes(CHUNK_BYTES)
    start = guest.memory.allocate(slots * (64 + CHUNK_BYTES))
    pieces = []
    for slot in range(slots):
        at = start + slot * (64 + CHUNK_BYTES)
        guest.memory.map[at : at + 44 + CHUNK_BYTES] = (
            header(RW, PORT, port, CHUNK_BYTES, buf_alloc=1 << 20) + payload
        )
        pieces.append([(GUEST_BASE + at, 44), (GUEST_BASE + at + 44, CHUNK_BYTES)])
    watch = Stopwatch()
    reading = asyncio.create_task(_read(sock, total))
    while sent < total:
        guest.tx.reap()
        while len(guest.tx.chains) < slots and sent < total and sent - freed + CHUNK_BYTES <= 256 * 1024:
            guest.tx.add(pieces[sent // CHUNK_BYTES % slots])
            guest.tx.ring_kick()
            sent += CHUNK_BYTES
        await guest.changed()
        guest.collect()
        while guest.packets:
            news = guest.packets.popleft().fwd_cnt
            freed += (news - freed) & 0xFFFF_FFFF
    await reading
    rate = watch.rate(total)
    sock.close()
    return rate


async def to_guest(device: UserVsock, guest: Guest, total: int) -> Rate:
    """The guest has rx buffers of 4 KiB, as Linux does, and gives credit in steps of 256 KiB."""
    sock, port = await _connected(device, guest, 1 << 20)
    received = credited = 0
    watch = Stopwatch()
    writing = asyncio.create_task(_write(sock, total))
    while received < total:
        await guest.changed()
        done = guest.rx.reap()
        for head, written in done:
            received += written - 44
            offset = guest._rx_at.pop(head)
            guest._rx_at[guest.rx.add([(GUEST_BASE + offset, guest.rx_bytes)], 2)] = offset
        if done:
            guest.rx.ring_kick()
        if received - credited >= 1 << 18:
            credited = received
            guest.send(6, PORT, port, buf_alloc=1 << 20, fwd_cnt=received & 0xFFFF_FFFF)
    await writing
    rate = watch.rate(total)
    sock.close()
    return rate


async def round_trips(device: UserVsock, guest: Guest, count: int) -> dict[str, float]:
    """Milliseconds from a host's write of 64 bytes to its read of the guest's echo."""
    sock, port = await _connected(device, guest, 1 << 20)
    loop = asyncio.get_running_loop()
    took = []
    for number in range(1, count + 1):
        began = time.perf_counter()
        sock.send(bytes(64))
        packet = await guest.packet(RW)
        guest.send(RW, PORT, port, packet.payload, buf_alloc=1 << 20, fwd_cnt=64 * number)
        await loop.sock_recv(sock, 100)
        took.append((time.perf_counter() - began) * 1e3)
    sock.close()
    took.sort()
    return {"median": round(took[count // 2], 4), "p99": round(took[count * 99 // 100], 4)}


async def _measure(mebibytes: int, trips: int) -> dict[str, object]:
    total = mebibytes << 20
    result: dict[str, object] = {"mebibytes": mebibytes}
    plain = await floor(total)
    result["floor"] = {"mb_per_s": plain.mb_per_s, "mb_per_cpu_s": plain.mb_per_cpu_s}
    for name, direction in (("to_host", to_host), ("to_guest", to_guest)):
        ours, theirs = socket.socketpair()
        device, guest = UserVsock(ours), Guest(theirs)
        await guest.boot()
        rate = await direction(device, guest, total)
        await device.aclose()
        guest.close()
        result[name] = {
            "mb_per_s": rate.mb_per_s,
            "mb_per_cpu_s": rate.mb_per_cpu_s,
            "cpu_ratio_to_floor": round(rate.cpu_s / plain.cpu_s, 2),
        }
    ours, theirs = socket.socketpair()
    device, guest = UserVsock(ours), Guest(theirs)
    await guest.boot()
    result["round_trip_ms"] = await round_trips(device, guest, trips)
    await device.aclose()
    guest.close()
    return result


def run(mebibytes: int = 256, trips: int = 2000) -> dict[str, object]:
    """Measure; throughput in MB (10^6 bytes) per second and per second of this process's CPU time."""
    return asyncio.run(_measure(mebibytes, trips))


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
