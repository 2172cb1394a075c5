"""What hosts and a well-behaved guest see of their streams."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from typing import TYPE_CHECKING

import pytest

from tests.unit.hypervisor.vsock.driver import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    Guest,
    Packet,
    exactly,
    header,
    soon,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from hypervisor.vsock.user import UserVsock

    Pair = tuple[UserVsock, Guest]

BUF_ALLOC = 256 * 1024


async def receive(sock: socket.socket, count: int = 1 << 16) -> bytes:
    return await asyncio.get_running_loop().sock_recv(sock, count)


async def receive_all(sock: socket.socket) -> bytes:
    data = b""
    while more := await receive(sock):
        data += more
    return data


async def send(sock: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(sock, data)


async def connected(
    device: UserVsock, guest: Guest, *, buf_alloc: int = 65536
) -> tuple[socket.socket, Packet]:
    """A stream to guest port 1024; the host's socket and the request as the guest saw it."""
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.accept(buf_alloc=buf_alloc)
    return await connecting, request


async def accepted(device: UserVsock, guest: Guest, port: int = 7000) -> socket.socket:
    """A stream from guest port 500 to host port 7000."""
    arrived: asyncio.Future[socket.socket] = asyncio.get_running_loop().create_future()
    device.listen(port, arrived.set_result)
    guest.send(REQUEST, 500, port)
    await guest.packet(RESPONSE)
    return await arrived


async def test_connect_asks_with_literal_packet(booted: Pair) -> None:
    device, guest = booted
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.packet()
    assert request == Packet(
        src_cid=2,
        dst_cid=3,
        src_port=request.src_port,
        dst_port=1024,
        length=0,
        type=1,
        op=REQUEST,
        flags=0,
        buf_alloc=BUF_ALLOC,
        fwd_cnt=0,
    )
    guest.send(RESPONSE, 1024, request.src_port)
    sock = await connecting
    assert sock.getblocking() is False
    assert device.stats.flows == 1
    sock.close()


async def test_refused_connect(booted: Pair) -> None:
    device, guest = booted
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.packet(REQUEST)
    guest.send(RST, 1024, request.src_port)
    with pytest.raises(ConnectionRefusedError, match="nothing listens on vsock port 1024"):
        await connecting
    assert device.stats.flows == 0


@pytest.mark.parametrize("op", [RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST, REQUEST, 0, 99])
async def test_wrong_answer_to_a_request_is_a_refusal(booted: Pair, op: int) -> None:
    device, guest = booted
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.packet(REQUEST)
    guest.send(op, 1024, request.src_port)
    with pytest.raises(ConnectionRefusedError):
        await connecting
    await guest.packet(RST)


async def test_connect_before_the_guest_is_up(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    connecting = [asyncio.create_task(device.connect(port)) for port in (1024, 1025)]
    await guest.boot(rx_buffers=0)
    assert device.driver_up
    guest.post(2)  # only now is there a buffer for the requests
    for port in (1024, 1025):
        assert (await guest.accept()).dst_port == port
    for task in connecting:
        (await task).close()


async def test_cancelled_connect_before_the_guest_is_up_leaves_no_request(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    connecting = asyncio.create_task(device.connect(1024))
    await asyncio.sleep(0)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert device.stats.flows == 0
    await guest.boot()
    other = asyncio.create_task(device.connect(9))
    assert (await guest.accept()).dst_port == 9, "the cancelled request never went out"
    (await other).close()


async def test_cancelled_connect_takes_the_request_back(booted: Pair) -> None:
    device, guest = booted
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.packet(REQUEST)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    rst = await guest.packet(RST)
    assert (rst.src_port, rst.dst_port) == (request.src_port, 1024)
    guest.send(RESPONSE, 1024, request.src_port)  # had crossed it
    await guest.packet(RST)


async def test_connect_cancelled_while_the_answer_is_handled(booted: Pair) -> None:
    device, guest = booted
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.packet(REQUEST)
    guest.send(RESPONSE, 1024, request.src_port)
    asyncio.get_running_loop().call_soon(connecting.cancel)
    with pytest.raises(asyncio.CancelledError):
        await connecting
    await guest.packet(RST)
    assert device.stats.flows == 0


async def test_connect_fails_when_the_vmm_goes_away(booted: Pair) -> None:
    device, guest = booted
    connecting = asyncio.create_task(device.connect(1024))
    await guest.packet(REQUEST)
    guest.vmm.close()
    with pytest.raises(ConnectionResetError, match="the front end closed"):
        await connecting
    assert "the front end closed" in str(await device.broken)
    with pytest.raises(ConnectionResetError, match="the front end closed"):
        await device.connect(1024)
    with pytest.raises(ConnectionResetError):
        device.listen(1, lambda sock: sock.close())


async def test_bytes_both_ways(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    await send(sock, b"hello guest")
    packet = await guest.packet(RW)
    assert (packet.payload, packet.dst_port, packet.src_port) == (b"hello guest", 1024, request.src_port)
    guest.send(RW, 1024, request.src_port, b"hello host", fwd_cnt=11)
    assert await receive(sock) == b"hello host"
    assert (device.stats.bytes_to_guest, device.stats.bytes_to_host) == (11, 10)
    sock.close()


async def test_guest_connects_to_a_listener(booted: Pair) -> None:
    device, guest = booted
    sock = await accepted(device, guest)
    assert sock.getblocking() is False
    guest.send(RW, 500, 7000, b"ready\n")
    assert await receive(sock) == b"ready\n"
    await send(sock, b"fine")
    assert (await guest.packet(RW)).payload == b"fine"
    sock.close()


async def test_guest_is_refused_where_nobody_listens(booted: Pair) -> None:
    _, guest = booted
    guest.send(REQUEST, 500, 7001)
    rst = await guest.packet(RST)
    assert (rst.src_port, rst.dst_port, rst.type) == (7001, 500, 1)


async def test_listener_twice_on_a_port(booted: Pair) -> None:
    device, _ = booted
    device.listen(7, lambda sock: sock.close())
    with pytest.raises(OSError, match="port 7 is already listened on"):
        device.listen(7, lambda sock: sock.close())


async def test_failing_listener_resets_the_stream(booted: Pair, quiet_loop: list[dict[str, Any]]) -> None:
    device, guest = booted

    def fail(_: socket.socket) -> None:
        raise RuntimeError("listener")

    device.listen(7, fail)
    guest.send(REQUEST, 500, 7)
    await guest.packet(RST)
    assert device.stats.flows == 0
    assert "port 7" in quiet_loop.pop()["message"]


async def test_packet_over_many_descriptors(booted: Pair) -> None:
    """Newer guests send one packet as a header and several data descriptors."""
    device, guest = booted
    sock, request = await connected(device, guest)
    payload = os.urandom(60_000)
    split = (1, 4095, 4096, 20_000, 8, 60_000 - 28_200)
    guest.send(RW, 1024, request.src_port, payload, split=split)
    assert await exactly(sock, len(payload)) == payload
    sock.close()


async def test_header_in_pieces_and_payload_in_the_headers_descriptor(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    packet = header(RW, 1024, request.src_port, 6) + b"abcdef"
    for split in [(50,), (1,) * 50, (43, 7), (44, 6), (45, 5), (20, 20, 10)]:
        guest.send_raw(packet, split)
        assert await receive(sock) == b"abcdef"
    sock.close()


@pytest.mark.parametrize("split", [(44, 4052), (4096,), (10, 34, 1, 4051), (20, 30, 4046)])
async def test_rx_buffers_of_any_shape(pair: Callable[..., Pair], split: tuple[int, ...]) -> None:
    device, guest = pair(rx_split=split, rx_bytes=4096)
    await guest.boot()
    sock, _ = await connected(device, guest)
    data = os.urandom(30_000)
    await send(sock, data)
    assert await guest.stream(len(data)) == data
    sock.close()


@pytest.mark.parametrize("size", [32 * 1024, 32 * 1024 + 1, 64 * 1024, 200_000])
async def test_large_writes_of_the_guest(booted: Pair, size: int) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    payload = os.urandom(size)
    guest.send(RW, 1024, request.src_port, payload, split=(size // 3, size - size // 3))
    assert await exactly(sock, size) == payload
    sock.close()


async def test_credit_of_the_guest_is_never_exceeded(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest, buf_alloc=10_000)
    sending = asyncio.create_task(send(sock, bytes(range(250)) * 100))
    received = await guest.stream(10_000)
    other, _ = await connected(device, guest)  # the device goes on meanwhile
    assert not guest.packets
    guest.send(CREDIT_UPDATE, 1024, request.src_port, buf_alloc=10_000, fwd_cnt=3)
    received += await guest.stream(3)
    guest.send(CREDIT_UPDATE, 1024, request.src_port, buf_alloc=30_000, fwd_cnt=10_003)
    received += await guest.stream(25_000 - 10_003)
    await sending
    assert received == bytes(range(250)) * 100
    sock.close()
    other.close()


async def test_guest_without_credit_to_give_stalls_only_its_stream(booted: Pair) -> None:
    device, guest = booted
    stalled, request = await connected(device, guest, buf_alloc=0)
    await send(stalled, b"later")
    other, _ = await connected(device, guest)
    await send(other, b"now")
    assert (await guest.packet(RW)).payload == b"now"
    guest.send(CREDIT_UPDATE, 1024, request.src_port, buf_alloc=100)
    assert (await guest.packet(RW)).payload == b"later"
    stalled.close()
    other.close()


async def test_slow_host_reader_stalls_only_its_stream_and_loses_nothing(booted: Pair) -> None:
    device, guest = booted
    slow, to_slow = await connected(device, guest)
    fast, to_fast = await connected(device, guest)
    sent = hashlib.sha256()
    total, freed = 0, 0
    chunk = 60_000
    # As much as the credit allows while nobody reads.
    while total - freed + chunk <= BUF_ALLOC:
        payload = os.urandom(chunk)
        sent.update(payload)
        guest.send(RW, 1024, to_slow.src_port, payload)
        total += chunk
        await guest.tx_used()
        guest.collect()
        while guest.packets:
            freed = guest.packets.popleft().fwd_cnt
    assert 2 * chunk < total, "the socket and the backlog took it"
    assert freed < total
    guest.send(RW, 1024, to_fast.src_port, b"not stalled")
    assert await receive(fast) == b"not stalled"
    # The reader wakes up: everything is there, and credit comes back for the rest.
    assert hashlib.sha256(await exactly(slow, total)).digest() == sent.digest()
    while freed < total - BUF_ALLOC // 4:
        freed = (await guest.packet(CREDIT_UPDATE)).fwd_cnt
    guest.send(RW, 1024, to_slow.src_port, b"goes on")
    assert await receive(slow) == b"goes on"
    slow.close()
    fast.close()


async def test_order_is_kept_when_the_reader_wakes_up_between_packets(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    sent, got = b"", b""
    for _ in range(5):
        payload = os.urandom(50_000)
        sent += payload
        guest.send(RW, 1024, request.src_port, payload)
        await guest.tx_used()
    for _ in range(20):
        payload = os.urandom(1000)
        sent += payload
        guest.send(RW, 1024, request.src_port, payload)  # is handled first,
        got += sock.recv(10_000)  # when there is room before the backlog moved
        await guest.tx_used()
    got += await exactly(sock, len(sent) - len(got))
    assert got == sent
    sock.close()


async def test_credit_request_is_answered(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    guest.send(RW, 1024, request.src_port, b"x" * 100)
    guest.send(CREDIT_REQUEST, 1024, request.src_port)
    update = await guest.packet(CREDIT_UPDATE)
    assert (update.buf_alloc, update.fwd_cnt) == (BUF_ALLOC, 100)
    sock.close()


async def test_credit_rides_on_data(booted: Pair) -> None:
    """A conversation tells credit in the packets it has anyway."""
    device, guest = booted
    sock, request = await connected(device, guest)
    for turn in range(1, 11):
        guest.send(RW, 1024, request.src_port, bytes(BUF_ALLOC // 5), fwd_cnt=turn - 1)
        await exactly(sock, BUF_ALLOC // 5)
        await send(sock, b"x")
        assert (await guest.packet(RW)).fwd_cnt == turn * (BUF_ALLOC // 5)
    sock.close()


async def test_credit_request_flood_is_bounded_by_the_flows(pair: Callable[..., Pair]) -> None:
    device, guest = pair()
    await guest.boot(rx_buffers=1)
    guest.repost = False
    connecting = asyncio.create_task(device.connect(1024))
    request = await guest.accept()
    sock = await connecting
    for _ in range(20):
        for _ in range(100):
            guest.send(CREDIT_REQUEST, 1024, request.src_port, kick=False)
        guest.tx.ring_kick()
        await guest.tx_used()
    guest.post(5)
    await guest.packet(CREDIT_UPDATE)
    await send(sock, b"x")
    await guest.packet(RW)
    assert not guest.packets
    sock.close()


async def test_counters_wrap(booted: Pair) -> None:
    """More than 2^32 bytes each way, in a hurry: the counters start near the end."""
    device, guest = booted
    sock, request = await connected(device, guest, buf_alloc=1000)
    flow = next(iter(device._switchboard._flows.values()))
    flow.sent = flow.peer_freed = 0xFFFF_FF00
    flow.received = flow.freed = flow.freed_told = 0xFFFF_FF00
    guest.send(CREDIT_UPDATE, 1024, request.src_port, buf_alloc=1000, fwd_cnt=0xFFFF_FF00)
    sending = asyncio.create_task(send(sock, b"a" * 1500))
    assert await guest.stream(1000) == b"a" * 1000
    assert not guest.packets
    guest.send(CREDIT_UPDATE, 1024, request.src_port, buf_alloc=1000, fwd_cnt=500 - 256)
    assert await guest.stream(500) == b"a" * 500
    await sending
    guest.send(RW, 1024, request.src_port, b"b" * 100_000, buf_alloc=1000, fwd_cnt=1500 - 256)
    assert (await guest.packet(CREDIT_UPDATE)).fwd_cnt == 100_000 - 256
    sock.close()


async def test_host_half_close(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    await send(sock, b"question")
    sock.shutdown(socket.SHUT_WR)
    assert (await guest.packet(RW)).payload == b"question"
    assert (await guest.packet(SHUTDOWN)).flags == 2
    guest.send(RW, 1024, request.src_port, b"answer")
    guest.send(SHUTDOWN, 1024, request.src_port, flags=3)
    assert await receive_all(sock) == b"answer"
    await guest.packet(RST)
    assert device.stats.flows == 0
    sock.close()


async def test_host_close_after_half_close_is_noticed(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    sock.shutdown(socket.SHUT_WR)
    assert (await guest.packet(SHUTDOWN)).flags == 2
    sock.close()
    assert (await guest.packet(SHUTDOWN)).flags == 3
    guest.send(RST, 1024, request.src_port)
    await guest.tx_used()
    assert device.stats.flows == 0


async def test_guest_half_close(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    guest.send(RW, 1024, request.src_port, b"request")
    guest.send(SHUTDOWN, 1024, request.src_port, flags=2)
    assert await receive_all(sock) == b"request"
    await send(sock, b"response")
    assert (await guest.packet(RW)).payload == b"response"
    sock.close()
    assert (await guest.packet(SHUTDOWN)).flags == 3


async def test_guest_that_reads_no_more(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    guest.send(SHUTDOWN, 1024, request.src_port, flags=1)
    await guest.tx_used()
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")
    guest.send(RW, 1024, request.src_port, b"still talks")
    assert await receive(sock) == b"still talks"
    sock.close()
    assert (await guest.packet(SHUTDOWN)).flags == 3


async def test_guest_closes_while_the_host_is_slow(booted: Pair) -> None:
    """The guest's last bytes outlive its end of the stream."""
    device, guest = booted
    sock, request = await connected(device, guest)
    payload = os.urandom(200_000) + os.urandom(60_000)
    guest.send(RW, 1024, request.src_port, payload[:200_000])
    guest.send(RW, 1024, request.src_port, payload[200_000:])
    guest.send(SHUTDOWN, 1024, request.src_port, flags=3)
    await guest.packet(RST)
    assert device.stats.flows == 1, "still delivering"
    guest.send(RST, 1024, request.src_port)
    assert await receive_all(sock) == payload
    assert device.stats.flows == 0
    sock.close()


async def test_host_closes_what_it_did_not_read_to_the_end(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    for _ in range(4):
        guest.send(RW, 1024, request.src_port, bytes(60_000))
    guest.send(SHUTDOWN, 1024, request.src_port, flags=3)
    await guest.packet(RST)
    assert device.stats.flows == 1
    sock.close()
    await soon(lambda: not device.stats.flows)


async def test_host_close_delivers_what_was_written(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest, buf_alloc=1000)
    sock.send(b"z" * 1500)
    sock.close()
    assert await guest.stream(1000) == b"z" * 1000
    assert device.stats.flows == 1
    guest.send(CREDIT_UPDATE, 1024, request.src_port, buf_alloc=1000, fwd_cnt=1000)
    assert await guest.stream(500) == b"z" * 500
    assert (await guest.packet(SHUTDOWN)).flags == 3
    guest.send(RW, 1024, request.src_port, b"crossed it")
    guest.send(RST, 1024, request.src_port)
    await guest.tx_used()
    assert device.stats.flows == 0


async def test_write_to_a_closed_host_tells_the_guest(booted: Pair) -> None:
    """Bytes of the host still wait for credit, but it reads no more."""
    device, guest = booted
    sock, request = await connected(device, guest, buf_alloc=0)
    sock.send(b"last words")
    sock.close()
    guest.send(RW, 1024, request.src_port, b"anyone?", buf_alloc=0)
    assert (await guest.packet(SHUTDOWN)).flags == 1
    guest.send(CREDIT_UPDATE, 1024, request.src_port, buf_alloc=100)
    assert await guest.stream(10) == b"last words"
    assert (await guest.packet(SHUTDOWN)).flags == 3


async def test_reset_by_the_guest_ends_the_hosts_stream(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    guest.send(RW, 1024, request.src_port, b"bye")
    guest.send(RST, 1024, request.src_port)
    assert await receive_all(sock) == b"bye"
    sock.close()


async def test_two_hundred_connections_one_after_the_other(booted: Pair) -> None:
    device, guest = booted
    ports = set()
    for number in range(200):
        sock, request = await connected(device, guest)
        ports.add(request.src_port)
        await send(sock, b"%d" % number)
        assert (await guest.packet(RW)).payload == b"%d" % number
        sock.close()
        await guest.packet(SHUTDOWN)
        guest.send(RST, 1024, request.src_port)
    await guest.tx_used()
    assert len(ports) == 200
    assert device.stats.flows == 0


async def test_closed_flows_give_back_their_share(booted: Pair) -> None:
    device, guest = booted
    arrived: list[socket.socket] = []
    device.listen(7, arrived.append)
    for port in range(300):
        guest.send(REQUEST, port, 7)
        assert (await guest.packet(RESPONSE)).buf_alloc == BUF_ALLOC
        guest.send(RST, port, 7)
        arrived.pop().close()


async def test_host_port_of_a_connect_is_free(booted: Pair) -> None:
    device, guest = booted
    one, first = await connected(device, guest)
    device.listen(first.src_port + 1, lambda sock: sock.close())
    device._switchboard._next_port = first.src_port  # as after four thousand million connects
    two, second = await connected(device, guest)
    assert second.src_port == first.src_port + 2
    one.close()
    two.close()


async def test_flows_are_capped(booted: Pair) -> None:
    device, guest = booted
    arrived: list[socket.socket] = []
    device.listen(7, arrived.append)
    for port in range(128):
        guest.send(REQUEST, port, 7)
        await guest.packet(RESPONSE)
    guest.send(REQUEST, 5000, 7)
    await guest.packet(RST)  # the guest has its share
    for _ in range(1024 - 128):
        sock, request = await connected(device, guest)
        arrived.append(sock)
        if len(arrived) == 129:
            assert request.buf_alloc == BUF_ALLOC
    assert request.buf_alloc == 32 * 1024, "late flows get less, so that all together stay bounded"
    with pytest.raises(ConnectionAbortedError, match="1024 vsock streams"):
        await device.connect(9)
    arrived.pop(0).close()  # one that is closing makes room
    await guest.packet(SHUTDOWN)
    connecting = asyncio.create_task(device.connect(1024))
    await guest.packet(RST)  # of the closing one
    await guest.accept()
    arrived.append(await connecting)
    guest.send(REQUEST, 5001, 7)
    await guest.packet(RST)
    assert device.stats.flows == 1024
    for sock in arrived:
        sock.close()


async def test_full_rx_ring_is_shared_fairly(pair: Callable[..., Pair]) -> None:
    device, guest = pair(ring_size=16)
    await guest.boot()
    one, request_one = await connected(device, guest, buf_alloc=1 << 20)
    two, request_two = await connected(device, guest, buf_alloc=1 << 20)
    guest.repost = False
    writers = [asyncio.create_task(send(sock, bytes(400_000))) for sock in (one, two)]
    await guest.until(lambda: not guest.rx.chains)
    counts = {request_one.src_port: 0, request_two.src_port: 0}
    for _ in range(20):
        guest.post(8)
        await guest.until(lambda: not guest.rx.chains)
        while guest.packets:
            packet = guest.packets.popleft()
            counts[packet.src_port] += packet.length
    assert min(counts.values()) * 3 > max(counts.values()), counts
    for task in writers:
        task.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    one.close()
    two.close()


async def test_many_streams_both_ways(booted: Pair) -> None:
    """A guest that echoes with correct credit; nothing is lost or mixed up."""
    device, guest = booted

    async def echo() -> None:
        freed: dict[int, int] = {}
        while True:
            packet = await guest.packet()
            if packet.op == REQUEST:
                guest.send(RESPONSE, packet.dst_port, packet.src_port)
            elif packet.op == RW:
                freed[packet.src_port] = freed.get(packet.src_port, 0) + packet.length
                while len(guest.tx.free) < 2:
                    await guest.changed()
                    guest.tx.reap()
                guest.send(
                    RW, packet.dst_port, packet.src_port, packet.payload, fwd_cnt=freed[packet.src_port]
                )
            elif packet.op == SHUTDOWN and packet.flags == 3:
                guest.send(RST, packet.dst_port, packet.src_port)

    async def client(number: int) -> None:
        sock = await device.connect(1024)
        data = os.urandom(20_000 + 1000 * number)
        writer = asyncio.create_task(send(sock, data))
        back = await exactly(sock, len(data))
        await writer
        assert back == data
        sock.close()

    echoing = asyncio.create_task(echo())
    await asyncio.gather(*(client(number) for number in range(30)))
    await soon(lambda: not device.stats.flows)
    echoing.cancel()
    await asyncio.gather(echoing, return_exceptions=True)


async def test_interrupts_only_when_wanted(booted: Pair) -> None:
    device, guest = booted
    sock, request = await connected(device, guest)
    await guest.tx_used()
    guest.tx.set_no_interrupt(True)
    before = guest.interrupts
    for _ in range(5):
        guest.send(RW, 1024, request.src_port, b"x")
        assert await receive(sock) == b"x"
    assert guest.interrupts == before
    guest.tx.set_no_interrupt(False)
    guest.send(RW, 1024, request.src_port, b"x")
    await guest.changed()
    sock.close()


async def test_close_is_idempotent_and_ends_everything(booted: Pair) -> None:
    device, guest = booted
    sock, _ = await connected(device, guest)
    connecting = asyncio.create_task(device.connect(1024))
    await guest.packet(REQUEST)
    await device.aclose()
    await device.aclose()
    with pytest.raises(ConnectionResetError, match="was closed"):
        await connecting
    assert await receive(sock) == b""
    assert "was closed" in str(await device.broken)
    sock.close()
