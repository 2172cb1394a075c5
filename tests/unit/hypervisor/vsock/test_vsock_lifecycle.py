"""The vhost-user side: what the VMM may ask for, in which order, and how rings and memory come and go."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING

import pytest

from hypervisor.vsock.user import UserVsock
from tests.unit.hypervisor.vsock.conftest import mappings, open_fds
from tests.unit.hypervisor.vsock.driver import (
    GUEST_BASE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SHUTDOWN,
    TX,
    USER_BASE,
    Guest,
    Memory,
    Ring,
    connected,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    Pair = tuple[UserVsock, Guest]


async def answers(guest: Guest, device: UserVsock) -> None:
    """The device still works."""
    sock, port = await connected(device, guest)
    guest.send(RW, 1024, port, b"works")
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"works"
    sock.close()
    await guest.packet(SHUTDOWN)
    guest.send(RST, 1024, port)


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFF_FFFF, 1 << 32])
async def test_reserved_context_ids(cid: int) -> None:
    with pytest.raises(ValueError, match="guest_cid"):
        UserVsock(None, guest_cid=cid)  # type: ignore[arg-type]


async def test_literal_handshake(pair: Callable[..., Pair]) -> None:
    """Requests and answers as bytes, written from the document (little-endian machines)."""
    _, guest = pair()
    vmm = guest.vmm

    async def exchange(sent: str, size: int) -> str:
        vmm.send_raw(bytes.fromhex(sent))
        return (await vmm.exactly(size)).hex()

    assert await exchange("010000000100000000000000", 20) == "0100000005000000080000000000004001000000"
    assert await exchange("0f0000000100000000000000", 20) == "0f000000050000000800000009a2000000000000"
    vmm.send_raw(bytes.fromhex("10000000010000000800000009a2000000000000"))
    assert await exchange("110000000100000000000000", 20) == "1100000005000000080000000300000000000000"
    assert await exchange("240000000100000000000000", 20) == "2400000005000000080000004000000000000000"
    vmm.send_raw(bytes.fromhex("030000000100000000000000"))
    get_config = "1800000001000000140000000000000008000000000000000000000000000000"
    assert (
        await exchange(get_config, 32) == "1800000005000000140000000000000008000000000000000300000000000000"
    )
    set_features_acknowledged = "0200000009000000080000000000004001000000"
    assert await exchange(set_features_acknowledged, 20) == "0200000005000000080000000000000000000000"


async def test_context_id_in_the_configuration_space() -> None:
    ours, theirs = socket.socketpair()
    device = UserVsock(ours, guest_cid=0x1234_5678)
    guest = Guest(theirs)
    answer = await guest.vmm.ask("GET_CONFIG", struct.pack("=III", 0, 8, 0) + bytes(8))
    assert answer[12:] == struct.pack("<Q", 0x1234_5678)
    assert (await guest.vmm.ask("GET_CONFIG", struct.pack("=III", 2, 3, 1)))[12:] == b"\x34\x12\0"
    assert await guest.vmm.ask("GET_CONFIG", struct.pack("=III", 4, 8, 0)) == b"", (
        "outside: the protocol's no"
    )
    await device.aclose()
    guest.close()


async def test_messages_in_pieces(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    for byte in bytes.fromhex("010000000100000000000000"):
        guest.vmm.send_raw(bytes([byte]))
        await asyncio.sleep(0)
    assert len(await guest.vmm.answer(1)) == 8
    await guest.boot()
    await answers(guest, device)


async def test_many_messages_at_once(pair: Callable[..., Pair]) -> None:
    _, guest = pair()
    guest.vmm.send_raw(bytes.fromhex("010000000100000000000000") * 200)
    for _ in range(200):
        assert len(await guest.vmm.answer(1)) == 8


async def test_unknown_request(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    guest.vmm.send(77, b"whatever")
    await guest.vmm.negotiate()
    assert await guest.vmm.ask(77, b"whatever") == struct.pack("=Q", 1), "an acknowledgement that says no"
    await guest.vmm.ask("SET_OWNER")
    assert not device.broken.done()


async def test_no_acknowledgement_unless_negotiated(pair: Callable[..., Pair]) -> None:
    _, guest = pair()
    guest.vmm.send("SET_OWNER", flags=1 | 8)
    assert len(await guest.vmm.ask("GET_FEATURES")) == 8, "the next answer is to the next question"


async def test_without_protocol_features_rings_start_enabled(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    await guest.vmm.ask("SET_FEATURES", struct.pack("=Q", 1 << 32))
    await guest.vmm.set_memory(guest.memory)
    for index, ring in ((RX, guest.rx), (TX, guest.tx)):
        await guest.vmm.ask("SET_VRING_NUM", struct.pack("=II", index, ring.size))
        addresses = [USER_BASE + part for part in (ring.desc, ring.used, ring.avail)]
        await guest.vmm.ask("SET_VRING_ADDR", struct.pack("=IIQQQQ", index, 0, *addresses, 0))
        await guest.vmm.ask("SET_VRING_CALL", struct.pack("=Q", index), [ring.call])
        await guest.vmm.ask("SET_VRING_KICK", struct.pack("=Q", index), [ring.kick])
    guest.post(4)
    await answers(guest, device)


async def test_disabled_ring_is_left_alone(booted: Pair) -> None:
    device, guest = booted
    await guest.vmm.ask("SET_VRING_ENABLE", struct.pack("=II", TX, 0))
    assert not device.driver_up
    guest.send(REQUEST, 1, 1)
    await guest.vmm.ask("SET_OWNER")
    assert guest.tx.device_index == 0
    await guest.vmm.ask("SET_VRING_ENABLE", struct.pack("=II", TX, 1))
    await guest.packet(RST)


async def test_ring_with_work_but_no_kick_starts_at_once(pair: Callable[..., Pair]) -> None:
    """The driver was faster than the VMM: its kick went to nobody."""
    _, guest = pair()
    guest.send(REQUEST, 1, 1, kick=False)
    await guest.boot()
    await guest.packet(RST)


async def test_call_descriptor_may_change_and_may_be_none(booted: Pair) -> None:
    device, guest = booted
    masked = os.eventfd(0, os.EFD_NONBLOCK)
    await guest.vmm.ask("SET_VRING_CALL", struct.pack("=Q", TX), [masked])
    guest.send(REQUEST, 1, 1)
    await guest.packet(RST)
    assert os.eventfd_read(masked) >= 1
    os.close(masked)
    await guest.vmm.ask("SET_VRING_CALL", struct.pack("=Q", TX | 1 << 8))
    guest.send(REQUEST, 1, 1)
    await guest.packet(RST)
    assert guest.tx.device_index == 2
    await guest.vmm.ask("SET_VRING_ERR", struct.pack("=Q", TX | 1 << 8))
    await answers(guest, device)


async def test_full_call_counter_does_not_block(booted: Pair) -> None:
    _, guest = booted
    guest.vmm.loop.remove_reader(guest.tx.call)
    os.eventfd_write(guest.tx.call, 0xFFFF_FFFF_FFFF_FFFE)
    guest.send(REQUEST, 1, 1)
    await guest.packet(RST)


async def test_pause_keeps_streams(booted: Pair) -> None:
    """A stopped VM hands the ring positions back and forth; nobody's stream notices."""
    device, guest = booted
    sock, port = await connected(device, guest)
    bases = await guest.stop_rings()
    assert bases == (guest.rx.device_index, guest.tx.device_index)
    assert not device.driver_up
    sock.send(b"while paused")
    connecting = asyncio.create_task(device.connect(9))
    await guest.vmm.ask("SET_OWNER")
    assert guest.rx.device_index == bases[RX]
    await guest.start_rings(bases)
    assert device.driver_up
    got = [await guest.packet(), await guest.packet()]
    assert sorted(packet.op for packet in got) == [REQUEST, RW]
    guest.send(RW, 1024, port, b"and back")
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"and back"
    guest.send(RESPONSE, 9, next(packet.src_port for packet in got if packet.op == REQUEST))
    (await connecting).close()
    sock.close()


async def test_new_driver_resets_streams_and_gets_pending_requests(booted: Pair) -> None:
    device, guest = booted
    sock, port = await connected(device, guest)
    guest.send(RW, 1024, port, b"said before the reboot")
    await guest.tx_used()
    connecting = asyncio.create_task(device.connect(9))
    await guest.packet(REQUEST)
    await guest.stop_rings()
    guest.reset_driver()
    await guest.start_rings()
    guest.post(8)
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"said before the reboot"
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == b""
    assert (await guest.accept()).dst_port == 9
    (await connecting).close()
    assert not guest.packets, "the request came once"
    sock.close()


async def test_new_driver_with_rings_started_apart(booted: Pair) -> None:
    """The second ring's start is not another driver's."""
    device, guest = booted
    sock, _ = await connected(device, guest)
    await guest.stop_rings()
    guest.reset_driver()
    connecting = asyncio.create_task(device.connect(9))
    await guest.vmm.start(RX, guest.rx)
    guest.post(8)
    request = await guest.packet(REQUEST)
    await guest.vmm.start(TX, guest.tx)
    guest.send(RESPONSE, 9, request.src_port)
    (await connecting).close()
    await guest.packet(SHUTDOWN)
    assert not guest.packets, "the request came once"
    sock.close()


async def test_device_reset(booted: Pair) -> None:
    device, guest = booted
    sock, _ = await connected(device, guest)
    await guest.vmm.ask("RESET_DEVICE")
    assert await asyncio.get_running_loop().sock_recv(sock, 100) == b""
    assert not device.driver_up
    guest.reset_driver()
    await guest.start_rings()
    guest.post(8)
    await answers(guest, device)
    sock.close()


async def test_owner_reset_disables_the_rings(booted: Pair) -> None:
    device, guest = booted
    await guest.vmm.ask("RESET_OWNER")
    assert not device.driver_up
    for ring in (RX, TX):
        await guest.vmm.ask("SET_VRING_ENABLE", struct.pack("=II", ring, 1))
    await answers(guest, device)


async def test_stop_takes_what_the_guest_had_sent(booted: Pair) -> None:
    """More packets than one turn handles, unkicked: they count, the ring's position says so."""
    device, guest = booted
    sock, port = await connected(device, guest)
    for number in range(60):
        guest.send(RW, 1024, port, b"%02d" % number, kick=False)
    await guest.vmm.stop(TX)
    assert sock.recv(1000) == b"".join(b"%02d" % number for number in range(60))
    sock.close()


async def test_last_words_of_a_killed_vmm(booted: Pair) -> None:
    """The connection's end and the last kick arrive together, in either order."""
    device, guest = booted
    sock, port = await connected(device, guest)
    payload = os.urandom(250_000)
    for start in range(0, len(payload), 50_000):
        guest.send(RW, 1024, port, payload[start : start + 50_000], kick=False)
    guest.vmm.close()
    await device.broken
    data = b""
    while more := await asyncio.get_running_loop().sock_recv(sock, 1 << 16):
        data += more
    assert data == payload
    assert device.stats.flows == 0
    sock.close()


async def test_memory_table_sent_again_while_running(booted: Pair) -> None:
    device, guest = booted
    sock, port = await connected(device, guest)
    before = mappings()
    for _ in range(5):
        await guest.vmm.set_memory(guest.memory)
        guest.send(RW, 1024, port, b"x")
        assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"x"
    assert mappings() == before, "old mappings are released"
    sock.close()


async def test_memory_moves_away_and_comes_back(booted: Pair) -> None:
    """The rings wait while the table does not have them."""
    device, guest = booted
    other = Memory(8192)
    region = struct.pack("=QQQQ", 0x9000_0000, 8192, 0x9000_0000, 0)
    await guest.vmm.ask("SET_MEM_TABLE", struct.pack("=II", 1, 0) + region, [other.fd])
    assert not device.driver_up
    await guest.vmm.set_memory(guest.memory)
    assert device.driver_up
    await answers(guest, device)
    other.close()


async def test_memory_slots_one_by_one(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    await guest.vmm.negotiate()
    half = guest.memory.size // 2
    low = struct.pack("=QQQQQ", 0, GUEST_BASE, half, USER_BASE, 0)
    high = struct.pack("=QQQQQ", 0, GUEST_BASE + half, half, USER_BASE + half, half)
    for slot in (low, high):
        await guest.vmm.ask("ADD_MEM_REG", slot, [guest.memory.fd])
    await guest.start_rings()
    guest.post(4)
    await answers(guest, device)
    # QEMU sends a descriptor along with a removal as well.
    await guest.vmm.ask("REM_MEM_REG", high, [guest.memory.fd])
    assert mappings() == 2, "the guest's own and the low half"
    await guest.vmm.ask("ADD_MEM_REG", high, [guest.memory.fd])
    await answers(guest, device)


async def test_buffer_across_two_regions(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    await guest.vmm.negotiate()
    half = guest.memory.size // 2
    for start in (0, half):
        slot = struct.pack("=QQQQQ", 0, GUEST_BASE + start, half, USER_BASE + start, start)
        await guest.vmm.ask("ADD_MEM_REG", slot, [guest.memory.fd])
    await guest.start_rings()
    guest.post(4)
    sock, port = await connected(device, guest)
    guest._tx_at = half - 100
    guest.send(RW, 1024, port, bytes(range(200)))
    assert await asyncio.get_running_loop().sock_recv(sock, 1000) == bytes(range(200))
    sock.close()


async def test_region_at_an_offset_that_is_not_a_page(pair: Callable[..., Pair]) -> None:
    device, guest = pair(first=0x1230)
    await guest.boot()
    await answers(guest, device)


async def test_event_queue_is_accepted_and_left_alone(booted: Pair) -> None:
    device, guest = booted
    ring = Ring(guest.memory, 8)
    await guest.vmm.start(2, ring)
    ring.add([(GUEST_BASE, 8)], 2)
    ring.ring_kick()
    await answers(guest, device)
    assert ring.device_index == 0
    assert await guest.vmm.stop(2) == 0
    ring.close()


def _vring_addr(descriptors: int, used: int, available: int) -> bytes:
    return struct.pack("=IIQQQQ", 0, 0, USER_BASE + descriptors, USER_BASE + used, USER_BASE + available, 0)


REGION = struct.pack("=QQQQ", GUEST_BASE, 8192, USER_BASE, 0)
MALFORMED = {
    "version 0": (struct.pack("=III", 1, 0, 0), 0, "version"),
    "a reply": (struct.pack("=III", 1, 5, 0), 0, "version"),
    "enormous": (struct.pack("=III", 1, 1, 1 << 31), 0, "bytes; at most"),
    "short u64": (struct.pack("=III", 2, 1, 4) + bytes(4), 0, "want 8"),
    "short state": (struct.pack("=III", 8, 1, 0), 0, "want 8"),
    "short config": (struct.pack("=III", 24, 1, 8) + bytes(8), 0, "want 12"),
    "ring 3": (struct.pack("=IIIII", 8, 1, 8, 3, 128), 0, "ring 3"),
    "ring of 100": (struct.pack("=IIIII", 8, 1, 8, 0, 100), 0, "power of two"),
    "ring of 0": (struct.pack("=IIIII", 8, 1, 8, 0, 0), 0, "power of two"),
    "ring of 65536": (struct.pack("=IIIII", 8, 1, 8, 0, 65536), 0, "power of two"),
    "crooked descriptors": (struct.pack("=III", 9, 1, 40) + _vring_addr(8, 0, 0), 0, "aligned"),
    "crooked used ring": (struct.pack("=III", 9, 1, 40) + _vring_addr(0, 2, 0), 0, "aligned"),
    "crooked available ring": (struct.pack("=III", 9, 1, 40) + _vring_addr(0, 0, 1), 0, "aligned"),
    "kick without descriptor": (struct.pack("=IIIQ", 12, 1, 8, 0), 0, "0 descriptors"),
    "kick to be polled": (struct.pack("=IIIQ", 12, 1, 8, 1 << 8), 0, "polled"),
    "kick with two descriptors": (struct.pack("=IIIQ", 12, 1, 8, 0), 2, "2 descriptors"),
    "call of ring 77": (struct.pack("=IIIQ", 13, 1, 8, 77), 1, "ring 77"),
    "features not offered": (struct.pack("=IIIQ", 2, 1, 8, 1 << 29), 0, "not offered"),
    "protocol features not offered": (struct.pack("=IIIQ", 16, 1, 8, 1 << 1), 0, "not offered"),
    "table without descriptors": (struct.pack("=IIIII", 5, 1, 8, 1, 0), 0, "with 0 descriptors"),
    "table too short": (struct.pack("=IIIII", 5, 1, 8, 1, 0), 1, "in 8 bytes"),
    "table of 9": (struct.pack("=IIIII", 5, 1, 8, 9, 0), 0, "9 regions"),
    "table of an eventfd": (struct.pack("=IIIII", 5, 1, 40, 1, 0) + REGION, 1, "cannot be mapped"),
    "slot without descriptor": (struct.pack("=III", 37, 1, 40) + bytes(8) + REGION, 0, "with 0 descriptors"),
    "slot of nothing": (struct.pack("=III", 37, 1, 40) + bytes(40), 1, "empty"),
    "unknown slot": (struct.pack("=III", 38, 1, 40) + bytes(8) + REGION, 0, "not in the table"),
    "nine descriptors": (struct.pack("=III", 3, 1, 0), 9, "more than 8 descriptors"),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_malformed_message_ends_the_device_only(pair: Callable[..., Pair], case: str) -> None:
    data, fds, text = MALFORMED[case]
    device, guest = pair()
    connecting = asyncio.create_task(device.connect(1))
    event = os.eventfd(0)
    before = len(open_fds())
    guest.vmm.send_raw(data, [event] * fds)
    assert text in str(await device.broken)
    with pytest.raises(ConnectionResetError, match="vhost-user"):
        await connecting
    with pytest.raises(EOFError):
        await guest.vmm.exactly(1)
    assert len(open_fds()) < before, "the connection is closed and no descriptor stays"
    os.close(event)


async def test_hang_up_in_the_middle_of_a_message_leaks_nothing(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    event = os.eventfd(0)
    guest.vmm.send_raw(struct.pack("=III", 12, 1, 8), [event])
    guest.vmm.close()
    assert "closed" in str(await device.broken)
    os.close(event)


async def test_descriptors_piled_up_over_the_pieces_of_a_message(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    event = os.eventfd(0)
    for byte in struct.pack("=III", 3, 1, 0)[:2]:
        guest.vmm.send_raw(bytes([byte]), [event] * 8)
    assert "more than 8 descriptors" in str(await device.broken)
    os.close(event)


async def test_descriptors_that_come_with_any_request_are_closed(pair: Callable[..., Pair]) -> None:
    _, guest = pair()
    event = os.eventfd(0)
    before = len(open_fds())
    guest.vmm.send("GET_FEATURES", fds=[event] * 8)
    await guest.vmm.answer(1)
    assert len(open_fds()) == before
    os.close(event)


async def test_overlapping_regions(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    guest.vmm.send("SET_MEM_TABLE", struct.pack("=II", 2, 0) + REGION + REGION, [guest.memory.fd] * 2)
    assert "overlaps" in str(await device.broken)


async def test_region_larger_than_its_file(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    region = struct.pack("=QQQQ", GUEST_BASE, guest.memory.size + 4096, USER_BASE, 0)
    guest.vmm.send("SET_MEM_TABLE", struct.pack("=II", 1, 0) + region, [guest.memory.fd])
    assert "cannot be mapped" in str(await device.broken)


@pytest.mark.parametrize("part", ["desc", "used", "avail"])
async def test_ring_outside_the_memory_table(pair: Callable[..., Pair], part: str) -> None:
    device, guest = pair()
    await guest.vmm.negotiate()
    await guest.vmm.set_memory(guest.memory)
    setattr(guest.rx, part, guest.memory.size - 16)
    with pytest.raises(EOFError):
        await guest.vmm.start(RX, guest.rx)
    assert "ring 0 is not inside the memory table" in str(await device.broken)


async def test_front_end_that_does_not_read_its_answers(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    question = bytes.fromhex("010000000100000000000000")
    while not device.broken.done():
        try:
            guest.vmm.send_raw(question * 100)
        except (BlockingIOError, BrokenPipeError):
            await asyncio.sleep(0)
    assert "vhost-user" in str(device.broken.result())


async def test_kick_descriptor_of_another_kind_that_ends(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    await guest.boot()
    reader, writer = os.pipe()
    await guest.vmm.ask("SET_VRING_KICK", struct.pack("=Q", TX), [reader])
    os.close(reader)
    os.close(writer)
    assert "kick descriptor was closed" in str(await device.broken)
