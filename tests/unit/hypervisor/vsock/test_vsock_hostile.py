"""A guest that lies. It may lose its device; the shim loses nothing."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor.vsock.user import UserVsock
from tests.unit.hypervisor.vsock.driver import (
    CREDIT_UPDATE,
    GUEST_BASE,
    INDIRECT,
    NEXT,
    REQUEST,
    RST,
    RW,
    SHUTDOWN,
    WRITE,
    Guest,
    connected,
    exactly,
    header,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Pair = tuple[UserVsock, Guest]


def loop_of_two(guest: Guest) -> None:
    guest.tx.describe(0, GUEST_BASE, 44, NEXT, 1)
    guest.tx.describe(1, GUEST_BASE, 44, NEXT, 0)
    guest.tx.offer(0)


def chain_longer_than_the_ring(guest: Guest) -> None:
    for index in range(128):
        guest.tx.describe(index, GUEST_BASE, 1, NEXT, (index + 1) % 128)
    guest.tx.offer(5)


def next_outside_the_table(guest: Guest) -> None:
    guest.tx.describe(0, GUEST_BASE, 44, NEXT, 128)
    guest.tx.offer(0)


def head_outside_the_table(guest: Guest) -> None:
    guest.tx.offer(0xFFFF)


def address_below_memory(guest: Guest) -> None:
    guest.tx.describe(0, GUEST_BASE - 1, 44, 0)
    guest.tx.offer(0)


def address_above_memory(guest: Guest) -> None:
    guest.tx.describe(0, GUEST_BASE + guest.memory.size - 43, 44, 0)
    guest.tx.offer(0)


def address_that_wraps(guest: Guest) -> None:
    guest.tx.describe(0, (1 << 64) - 4, 0xFFFF_FFFF, 0)
    guest.tx.offer(0)


def enormous_length(guest: Guest) -> None:
    guest.tx.describe(0, GUEST_BASE, 0xFFFF_FFFF, 0)
    guest.tx.offer(0)


def writable_in_the_tx_ring(guest: Guest) -> None:
    guest.tx.add([(GUEST_BASE, 44)], WRITE)


def indirect_not_negotiated(guest: Guest) -> None:
    guest.tx.add([(GUEST_BASE, 64)], INDIRECT)


def index_beyond_the_ring(guest: Guest) -> None:
    guest.tx.set_avail_index(129)


def index_backwards(guest: Guest) -> None:
    guest.tx.set_avail_index(0xFFFF)


VIOLATIONS: dict[Callable[[Guest], None], str] = {
    loop_of_two: "longer than the table",
    chain_longer_than_the_ring: "longer than the table",
    next_outside_the_table: "descriptor 128 is outside",
    head_outside_the_table: "descriptor 65535 is outside",
    address_below_memory: "outside guest memory",
    address_above_memory: "outside guest memory",
    address_that_wraps: "outside guest memory",
    enormous_length: "outside guest memory",
    writable_in_the_tx_ring: "wrong direction",
    indirect_not_negotiated: "not negotiated",
    index_beyond_the_ring: "129 buffers available in a ring of 128",
    index_backwards: "buffers available in a ring of 128",
}


@pytest.mark.parametrize("violate", VIOLATIONS, ids=lambda violate: violate.__name__)
async def test_broken_tx_ring_ends_the_device_only(
    pair: Callable[..., Pair], violate: Callable[[Guest], None]
) -> None:
    device, guest = pair()
    await guest.boot(rx_buffers=0)
    connecting = asyncio.create_task(device.connect(1))
    violate(guest)
    guest.tx.ring_kick()
    reason = await device.broken
    assert str(reason).startswith("the guest broke the rules of virtio: ")
    assert VIOLATIONS[violate] in str(reason)
    with pytest.raises(ConnectionResetError, match="broke the rules"):
        await connecting
    assert not device.driver_up
    assert os.eventfd_read(guest.tx.err) == 1, "the VMM is told"
    # It still answers the VMM, which wants to stop or reset it, but starts no ring again.
    await guest.vmm.stop(0)
    await guest.vmm.stop(1)
    guest.reset_driver()
    await guest.start_rings()
    assert not device.driver_up


def read_only(guest: Guest) -> None:
    guest.rx.add([(GUEST_BASE, 4096)])


def too_small(guest: Guest) -> None:
    guest.rx.add([(GUEST_BASE, 40), (GUEST_BASE, 4)], WRITE)


def empty(guest: Guest) -> None:
    guest.rx.add([(GUEST_BASE, 0)], WRITE)


def outside(guest: Guest) -> None:
    guest.rx.add([(GUEST_BASE - 4096, 4096)], WRITE)


def rx_index_beyond_the_ring(guest: Guest) -> None:
    guest.rx.set_avail_index(1000)


RX_VIOLATIONS: dict[Callable[[Guest], None], str] = {
    read_only: "wrong direction",
    too_small: "rx buffer of 44 bytes",
    empty: "rx buffer of 0 bytes",
    outside: "outside guest memory",
    rx_index_beyond_the_ring: "999 buffers available in a ring of 128",
}


@pytest.mark.parametrize("violate", RX_VIOLATIONS, ids=lambda violate: violate.__name__)
async def test_broken_rx_ring_ends_the_device_only(
    pair: Callable[..., Pair], violate: Callable[[Guest], None]
) -> None:
    device, guest = pair()
    await guest.boot(rx_buffers=1)
    guest.repost = False
    sock, _ = await connected(device, guest)
    violate(guest)
    guest.rx.ring_kick()
    sock.send(b"x")
    assert RX_VIOLATIONS[violate] in str(await device.broken)
    with pytest.raises(ConnectionResetError):  # not a clean end: what it wrote went nowhere
        sock.recv(10)
    sock.close()


async def test_nothing_is_taken_from_a_guest_that_broke_the_rules(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    await guest.boot(rx_buffers=1)
    guest.repost = False
    sock, port = await connected(device, guest)
    await guest.tx_used()
    taken = guest.tx.device_index
    guest.send(RW, 1024, port, b"unkicked", kick=False)
    sock.send(b"x")
    too_small(guest)
    guest.rx.ring_kick()
    await device.broken
    assert guest.tx.device_index == taken
    sock.close()


async def test_empty_descriptors_are_skipped(booted: Pair) -> None:
    device, guest = booted
    sock, port = await connected(device, guest)
    start = guest.memory.size - 4096
    packet = header(RW, 1024, port, 3) + b"abc"
    guest.memory.map[start : start + 47] = packet
    at = GUEST_BASE + start
    guest.tx.add([(0, 0), (at, 44), (at, 0), (at + 44, 3), (7, 0)])
    guest.tx.ring_kick()
    assert await asyncio.get_running_loop().sock_recv(sock, 10) == b"abc"
    sock.close()


async def test_very_many_pieces_in_one_packet(pair: Callable[..., Pair]) -> None:
    """More than a system call takes; each of one byte."""
    device, guest = pair(ring_size=2048, rx_bytes=64)
    await guest.boot(rx_buffers=64)
    sock, port = await connected(device, guest)
    payload = os.urandom(1500)
    guest.send(RW, 1024, port, payload, split=(1,) * 1500)
    assert await exactly(sock, 1500) == payload
    sock.close()


async def test_very_many_pieces_in_one_rx_buffer(pair: Callable[..., Pair]) -> None:
    device, guest = pair(ring_size=2048, rx_bytes=700, rx_split=(1,) * 700)
    await guest.boot()
    sock, _ = await connected(device, guest)
    data = os.urandom(5000)
    sock.send(data)
    assert await guest.stream(5000) == data
    sock.close()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        header(RW, 1, 1)[:43],
        header(REQUEST, 1, 7, src_cid=4),
        header(REQUEST, 1, 7, src_cid=3 | 1 << 32),
        header(REQUEST, 1, 7, dst_cid=0),
        header(REQUEST, 1, 7, dst_cid=1),
        header(REQUEST, 1, 7, dst_cid=3),
        header(REQUEST, 1, 7, dst_cid=0xFFFF_FFFF),
    ],
    ids=repr,
)
async def test_packets_that_go_nowhere(booted: Pair, data: bytes) -> None:
    device, guest = booted
    device.listen(7, lambda sock: sock.close())
    guest.memory.map[guest._tx_at : guest._tx_at + 64] = data.ljust(64, b"\0")
    guest.tx.add([(GUEST_BASE + guest._tx_at, len(data))])
    guest.tx.ring_kick()
    await guest.tx_used()
    guest.collect()
    assert not guest.packets
    assert (device.stats.dropped_packets, device.stats.flows) == (1, 0)


@pytest.mark.parametrize("type", [0, 2, 3, 0xFFFF])
async def test_other_socket_types_are_refused_in_kind(booted: Pair, type: int) -> None:
    device, guest = booted
    device.listen(7, lambda sock: sock.close())
    guest.send(REQUEST, 1, 7, type=type)
    assert (await guest.packet(RST)).type == type


@pytest.mark.parametrize("op", [0, 2, 4, 5, 6, 7, 8, 0xFFFF])
async def test_packets_for_no_stream_are_refused(booted: Pair, op: int) -> None:
    _, guest = booted
    guest.send(op, 1, 2, b"abc")
    rst = await guest.packet(RST)
    assert (rst.src_port, rst.dst_port) == (2, 1)


async def test_reset_is_never_answered(booted: Pair) -> None:
    _, guest = booted
    guest.send(RST, 1, 2)
    guest.send(RST, 1, 2, type=2)
    guest.send(REQUEST, 1, 3)
    assert (await guest.packet(RST)).src_port == 3
    assert not guest.packets


@pytest.mark.parametrize("op", [0, REQUEST, 2, 8, 0xFFFF])
async def test_nonsense_on_an_open_stream_resets_it(booted: Pair, op: int) -> None:
    device, guest = booted
    sock, port = await connected(device, guest)
    guest.send(op, 1024, port)
    await guest.packet(RST)
    assert await asyncio.get_running_loop().sock_recv(sock, 10) == b""
    assert device.stats.flows == 0
    sock.close()


async def test_length_beyond_the_chain_resets_the_stream(booted: Pair) -> None:
    device, guest = booted
    sock, port = await connected(device, guest)
    guest.send(RW, 1024, port, b"abc", length=4)
    await guest.packet(RST)
    assert await asyncio.get_running_loop().sock_recv(sock, 10) == b""
    assert not device.broken.done()
    sock.close()


async def test_bytes_after_the_packet_are_not_part_of_it(booted: Pair) -> None:
    device, guest = booted
    sock, port = await connected(device, guest)
    guest.send(RW, 1024, port, b"abcdef", length=3)
    guest.send(RW, 1024, port, b"ghi")
    guest.send(RW, 1024, port, b"xyz", length=0)
    await guest.tx_used()
    assert sock.recv(100) == b"abcghi"
    sock.close()


async def test_more_than_our_credit_resets_that_stream_only(booted: Pair) -> None:
    device, guest = booted
    liar, to_liar = await connected(device, guest)
    other, to_other = await connected(device, guest)
    for _ in range(20):  # twenty times 60 000, which nobody reads
        guest.send(RW, 1024, to_liar, bytes(60_000))
        await guest.tx_used()
    while (packet := await guest.packet()).op != RST:
        assert packet.op == CREDIT_UPDATE
    assert packet.src_port == to_liar
    guest.send(RW, 1024, to_other, b"fine")
    assert await asyncio.get_running_loop().sock_recv(other, 10) == b"fine"
    assert device.stats.flows == 1
    liar.close()
    other.close()


async def test_claims_about_our_bytes_stall_only_the_liar(booted: Pair) -> None:
    """It has freed what was never sent: that is no credit."""
    device, guest = booted
    sock, port = await connected(device, guest)
    guest.send(CREDIT_UPDATE, 1024, port, buf_alloc=1000, fwd_cnt=5000)
    await guest.tx_used()
    sock.send(b"abc")
    other, _ = await connected(device, guest)
    other.send(b"fine")
    assert (await guest.packet(RW)).payload == b"fine"
    assert not guest.packets
    guest.send(CREDIT_UPDATE, 1024, port, buf_alloc=1000, fwd_cnt=0)
    assert (await guest.packet(RW)).payload == b"abc"
    sock.close()
    other.close()


async def test_payload_for_a_closed_host_is_dropped_up_to_our_credit(booted: Pair) -> None:
    device, guest = booted
    sock, port = await connected(device, guest)
    sock.close()
    assert (await guest.packet(SHUTDOWN)).flags == 3
    for _ in range(4):
        guest.send(RW, 1024, port, bytes(60_000))
    await guest.tx_used()
    guest.collect()
    assert not guest.packets
    guest.send(RW, 1024, port, bytes(60_000))
    await guest.packet(RST)
    assert device.stats.flows == 0


async def test_refusals_are_bounded_while_the_guest_gives_no_buffers(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    await guest.boot(rx_buffers=0)
    for _ in range(30):
        for port in range(100):
            guest.send(REQUEST, port, 9, kick=False)
        guest.tx.ring_kick()
        await guest.tx_used()
    guest.post(64)
    for _ in range(1024):
        await guest.packet(RST)
    await guest.vmm.ask("SET_OWNER")
    guest.collect()
    assert not guest.packets
    assert device.stats.dropped_packets == 30 * 100 - 1024


async def test_endless_traffic_leaves_the_loop_to_others(booted: Pair) -> None:
    """A guest that keeps its ring full must share the event loop with everything else."""
    _, guest = booted
    turns = 0
    for _ in range(20):
        for port in range(60):
            guest.send(REQUEST, port, 9, kick=False)
        guest.tx.ring_kick()
        while guest.tx.device_index != guest.tx.avail_index and turns < 1000:
            turns += 1
            await asyncio.sleep(0)
        guest.tx.reap()
        guest.collect()
    assert 40 <= turns < 1000, "sixty packets take at least two turns"


ODD = st.sampled_from([0, 1, 2, 3, 43, 44, 45, 127, 128, 129, 4096, 0x7FFF, 0x8000, 0xFFFF, 0xFFFF_FFFF])
DESCRIPTOR = st.tuples(
    st.one_of(
        st.integers(GUEST_BASE, GUEST_BASE + (4 << 20)),
        st.integers(0, (1 << 64) - 1),
        st.just(GUEST_BASE + (4 << 20) - 50),
    ),
    st.one_of(st.integers(0, 5000), ODD),
    st.sampled_from([0, NEXT, WRITE, NEXT | WRITE, INDIRECT, 0xFFFF]),
    st.one_of(st.integers(0, 15), ODD.map(lambda number: number & 0xFFFF)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    table=st.lists(DESCRIPTOR, min_size=16, max_size=16),
    heads=st.lists(st.integers(0, 17), min_size=1, max_size=16),
    jump=st.one_of(st.just(0), st.integers(0, 0xFFFF)),
    rx=st.booleans(),
    seed=st.integers(0, 1 << 32),
)
async def test_any_ring(
    table: list[tuple[int, int, int, int]], heads: list[int], jump: int, rx: bool, seed: int
) -> None:
    """Whatever is in a ring: the device goes on or is broken, in bounded time, and then closes cleanly."""
    ours, theirs = socket.socketpair()
    device, guest = UserVsock(ours), Guest(theirs, ring_size=16)
    await guest.boot(rx_buffers=4)
    guest.repost = False
    sock, _ = await connected(device, guest)
    guest.memory.map[65536:131072] = random.Random(seed).randbytes(65536)
    ring = guest.rx if rx else guest.tx
    for index, descriptor in enumerate(table):
        ring.describe(index, *descriptor[:3], descriptor[3])
    for head in heads:
        ring.offer(head)
    ring.set_avail_index((ring.avail_index + jump) & 0xFFFF)
    ring.ring_kick()
    sock.send(bytes(3000))
    await guest.vmm.ask("SET_OWNER")
    for _ in range(10):
        await asyncio.sleep(0)
    await device.aclose()
    assert "defect" not in str(await device.broken)
    sock.close()
    guest.close()


PORT = st.sampled_from([1, 2, 1024, 7, 49152, 49153, 0xFFFF_FFFF])
PACKET = st.tuples(
    st.integers(0, 9),
    PORT,
    PORT,
    st.binary(max_size=300),
    st.one_of(st.none(), ODD),
    st.integers(0, 4),
    ODD,
    ODD,
    st.sampled_from([1, 1, 1, 1, 2, 0]),
    st.sampled_from([3, 3, 3, 3, 3, 4]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(packets=st.lists(PACKET, max_size=40), close_at=st.integers(0, 40))
async def test_any_packets(packets: list[tuple[Any, ...]], close_at: int) -> None:
    """Whatever a guest says in well-formed chains never breaks the device."""
    ours, theirs = socket.socketpair()
    device, guest = UserVsock(ours), Guest(theirs)
    await guest.boot()
    socks: list[socket.socket] = []
    device.listen(7, socks.append)
    connecting = [asyncio.create_task(device.connect(1024)) for _ in range(2)]
    for number, (op, source, target, payload, length, flags, alloc, freed, kind, cid) in enumerate(packets):
        guest.send(
            op,
            source,
            target,
            payload,
            length=length,
            flags=flags,
            buf_alloc=alloc,
            fwd_cnt=freed,
            type=kind,
            src_cid=cid,
        )
        await guest.tx_used()
        guest.collect()
        for sock in socks:
            try:
                sock.send(b"host")
            except OSError:
                sock.close()
        if number == close_at:
            while socks:
                socks.pop().close()
        socks[:] = [sock for sock in socks if sock.fileno() >= 0]
    assert not device.broken.done()
    await device.aclose()
    for result in await asyncio.gather(*connecting, return_exceptions=True):
        if isinstance(result, socket.socket):
            result.close()
        else:
            assert isinstance(result, OSError)
    for sock in socks:
        sock.close()
    guest.close()


REQUESTS = st.tuples(st.integers(0, 42), st.binary(max_size=64), st.integers(0, 3), st.sampled_from([1, 9]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=st.lists(REQUESTS, max_size=20))
async def test_any_requests(requests: list[tuple[int, bytes, int, int]]) -> None:
    """Whatever a front end asks: an answer or a broken device, and never a leak."""
    ours, theirs = socket.socketpair()
    device, guest = UserVsock(ours), Guest(theirs)
    event = os.eventfd(0)
    for number, payload, fds, flags in requests:
        try:
            guest.vmm.send(number, payload, [event] * fds, flags)
        except OSError:
            assert device.broken.done()
            break
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await device.aclose()
    assert "defect" not in str(await device.broken)
    guest.close()
    os.close(event)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200))
async def test_any_bytes(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    device = UserVsock(ours)
    theirs.send(data + struct.pack("=III", 1, 1, 0))
    theirs.shutdown(socket.SHUT_WR)
    await device.broken
    await device.aclose()
    assert "defect" not in str(await device.broken)
    theirs.close()
