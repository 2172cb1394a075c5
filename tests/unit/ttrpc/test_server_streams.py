"""What the server makes of stream frames, byte by byte."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from tests.unit.ttrpc.peer import (
    DATA,
    ECHO,
    LIMIT,
    NO_DATA,
    REMOTE_CLOSED,
    REMOTE_OPEN,
    RESPONSE,
    Frame,
    Peer,
    failure,
    field,
    frame,
    request,
    text,
)
from ttrpc import Call, Code, RpcError, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    Connect = Callable[[Server], AbstractAsyncContextManager[Peer]]

END = REMOTE_CLOSED | NO_DATA


async def up(messages: AsyncIterator[StringValue], call: Call) -> StringValue:
    return StringValue(value=",".join([message.value async for message in messages]))


async def first_only(messages: AsyncIterator[StringValue], call: Call) -> StringValue:
    return await anext(messages)


async def down(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
    for letter in message.value:
        yield StringValue(value=letter)


async def both(messages: AsyncIterator[StringValue], call: Call) -> AsyncIterator[StringValue]:
    async for message in messages:
        yield StringValue(value=message.value.upper())


def stream_server(**handlers: Any) -> Server:
    server = Server()
    server.register(ECHO, {"Up": up, "Down": down, "Both": both, **handlers})
    return server


async def test_a_client_stream(connect: Connect) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(
            bytes.fromhex("0000000c 00000001 01 02" + "0a06742e4563686f" + "12025570"),
            bytes.fromhex("00000003 00000001 03 00" + "0a0161"),
            bytes.fromhex("00000000 00000001 03 00"),  # an empty message is a message
            bytes.fromhex("00000003 00000001 03 00" + "0a0162"),
            bytes.fromhex("00000000 00000001 03 05"),
        )
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text("a,,b")))


async def test_a_server_stream(connect: Connect) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(request(1, "Down", text("ab"), flags=REMOTE_CLOSED))
        assert await peer.exactly(13) == bytes.fromhex("00000003 00000001 03 00 0a0161")
        assert await peer.exactly(13) == bytes.fromhex("00000003 00000001 03 00 0a0162")
        assert await peer.exactly(10) == bytes.fromhex("00000000 00000001 03 05")


async def test_both_ways_with_half_close(connect: Connect) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(request(1, "Both", flags=REMOTE_OPEN), frame(1, DATA, 0, text("a")))
        assert await peer.frame() == Frame(1, DATA, 0, text("A"))
        await peer.send(frame(1, DATA, REMOTE_CLOSED, text("b")))  # the last message and the end in one frame
        assert await peer.frame() == Frame(1, DATA, 0, text("B"))
        assert await peer.frame() == Frame(1, DATA, END, b"")


@pytest.mark.parametrize(
    ("flags", "payload", "messages"),
    [
        (0, b"", ""),
        (0, text("a"), "a"),
        (REMOTE_CLOSED, text("a"), "a"),
        (REMOTE_CLOSED | REMOTE_OPEN, text("a"), "a"),
    ],
)
async def test_a_client_stream_that_is_closed_by_its_request(
    connect: Connect, flags: int, payload: bytes, messages: str
) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(request(1, "Up", payload, flags=flags))
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text(messages)))


async def test_a_payload_in_the_request_is_the_first_message(connect: Connect) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(request(1, "Up", text("a"), flags=REMOTE_OPEN))
        await peer.send(frame(1, DATA, 0, text("b")), frame(1, DATA, END, b""))
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text("a,b")))


async def test_bytes_of_a_frame_without_data_are_no_message(connect: Connect) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(request(1, "Up", flags=REMOTE_OPEN), frame(1, DATA, NO_DATA, text("x")))
        await peer.send(frame(1, DATA, 0, text("a")), frame(1, DATA, END, text("x")))
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text("a")))


@pytest.mark.parametrize("stream_id", [1, 2, 77])
async def test_data_on_an_unknown_stream(connect: Connect, stream_id: int) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(frame(stream_id, DATA, 0, text("x")))
        assert await peer.frame() == failure(stream_id, 3, "stream is not active")


async def test_data_after_the_close_ends_the_stream(connect: Connect) -> None:
    async def wait(messages: AsyncIterator[StringValue], call: Call) -> StringValue:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async with connect(stream_server(Up=wait)) as peer:
        await peer.send(request(1, "Up", flags=REMOTE_OPEN), frame(1, DATA, END, b""))
        await peer.send(frame(1, DATA, 0, text("x")))
        assert await peer.frame() == failure(1, 3, "data after the client closed its side of the stream")


async def test_the_server_may_answer_early(connect: Connect) -> None:
    async with connect(stream_server(Up=first_only)) as peer:
        await peer.send(request(1, "Up", flags=REMOTE_OPEN), frame(1, DATA, 0, text("a")))
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text("a")))
        await peer.send(frame(1, DATA, 0, text("b")))
        assert await peer.frame() == failure(1, 3, "stream is not active")


async def test_an_error_in_the_middle_of_a_server_stream(connect: Connect) -> None:
    async def failing(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
        yield message
        raise RpcError(Code.DATA_LOSS, "disk")

    async with connect(stream_server(Down=failing)) as peer:
        await peer.send(request(1, "Down", text("a"), flags=REMOTE_CLOSED))
        assert await peer.frame() == Frame(1, DATA, 0, text("a"))
        assert await peer.frame() == failure(1, 15, "disk")


async def test_a_message_of_a_stream_that_does_not_decode(connect: Connect) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(request(1, "Up", flags=REMOTE_OPEN), frame(1, DATA, 0, b"\x0a\x7f"))
        answer = await peer.frame()
    assert (answer.stream_id, answer.kind) == (1, RESPONSE)
    assert b"malformed google.protobuf.StringValue" in answer.data


async def test_an_oversized_message_ends_only_its_stream(connect: Connect) -> None:
    async with connect(stream_server()) as peer:
        await peer.send(request(1, "Both", flags=REMOTE_OPEN), request(3, "Both", flags=REMOTE_OPEN))
        await peer.send(frame(1, DATA, 0, bytes(LIMIT + 1)), frame(3, DATA, 0, text("a")))
        assert await peer.frame() == failure(
            1, 8, "message of 4194305 bytes is over the limit of 4194304 bytes"
        )
        assert await peer.frame() == Frame(3, DATA, 0, text("A"))


async def test_a_message_the_server_cannot_send_ends_the_stream(connect: Connect) -> None:
    async def huge(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
        yield StringValue(value="x" * LIMIT)

    async with connect(stream_server(Down=huge)) as peer:
        await peer.send(request(1, "Down", flags=REMOTE_CLOSED))
        assert (await peer.frame()).data[2:4] == b"\x08\x08"


async def test_a_deadline_ends_a_stream_and_closes_its_generator(connect: Connect) -> None:
    closed = asyncio.Event()

    async def endless(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
        try:
            yield message
            await asyncio.get_running_loop().create_future()
        finally:
            closed.set()

    async with connect(stream_server(Down=endless)) as peer:
        await peer.send(request(1, "Down", text("a"), flags=REMOTE_CLOSED, timeout_nano=20_000_000))
        assert await peer.frame() == Frame(1, DATA, 0, text("a"))
        assert await peer.frame() == failure(1, 4, "deadline exceeded")
        assert closed.is_set()


async def test_a_generator_is_closed_when_its_client_goes_while_it_waits_to_send(connect: Connect) -> None:
    closed = asyncio.Event()

    async def flood(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
        try:
            while True:
                yield StringValue(value="x" * 500_000)
        finally:
            closed.set()

    async with connect(stream_server(Down=flood)) as peer:
        await peer.send(request(1, "Down", flags=REMOTE_CLOSED))
        await peer.frame()
        peer.close()
        await closed.wait()


async def test_a_slow_handler_stops_the_client(connect: Connect) -> None:
    """What is not consumed stays in the client's socket, except for a bounded queue, and all of it arrives."""
    go = asyncio.Event()

    async def slow(messages: AsyncIterator[StringValue], call: Call) -> StringValue:
        await go.wait()
        return StringValue(value=str(sum([len(message.value) async for message in messages])))

    async with connect(stream_server(Up=slow)) as peer:
        await peer.send(request(1, "Up", flags=REMOTE_OPEN))
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while sent < 200:
                await peer.send(frame(1, DATA, 0, text("x" * 100_000)))
                sent += 1
            await peer.send(frame(1, DATA, END, b""))

        flooding = asyncio.create_task(flood())
        done, _ = await asyncio.wait([flooding], timeout=0.5)
        assert not done
        assert sent < 50
        go.set()
        await flooding
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text(str(200 * 100_000))))


async def test_messages_that_nobody_consumed_do_not_stop_the_connection(connect: Connect) -> None:
    async with connect(stream_server(Up=first_only)) as peer:
        await peer.send(request(1, "Up", flags=REMOTE_OPEN), *[frame(1, DATA, 0, text("a"))] * 5000)
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text("a")))
        await peer.send(request(3, "Up"))
        while (answer := await peer.frame()).stream_id == 1:
            assert answer == failure(1, 3, "stream is not active")
        assert answer == Frame(3, RESPONSE, 0, b"")


async def test_an_interceptor_wraps_a_stream(connect: Connect) -> None:
    async def interceptor(call: Call, messages: Any, proceed: Any) -> Any:
        answers = await proceed(messages, call)

        async def doubled() -> AsyncIterator[StringValue]:
            async for answer in answers:
                yield StringValue(value=answer.value * 2)

        return doubled()

    server = Server(interceptor=interceptor)
    server.register(ECHO, {"Both": both})
    async with connect(server) as peer:
        await peer.send(request(1, "Both", text("a"), flags=REMOTE_CLOSED))
        assert await peer.frame() == Frame(1, DATA, 0, text("AA"))
        assert await peer.frame() == Frame(1, DATA, END, b"")
