"""What the client writes and how it takes the answers, byte by byte; the server is raw bytes."""

from __future__ import annotations

import asyncio
import gc
import socket
from typing import Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from tests.unit.ttrpc.peer import (
    DATA,
    ECHO,
    LIMIT,
    NO_DATA,
    REMOTE_CLOSED,
    RESPONSE,
    Peer,
    field,
    frame,
    response,
    status_body,
    text,
)
from ttrpc import Client, Code, ConnectionClosed, RpcError, StreamClosed

Pair = tuple[Client, Peer]
END = REMOTE_CLOSED | NO_DATA


async def unary(client: Client, value: str = "hi", **options: Any) -> str:
    answer: StringValue = await client.call("t.Echo", ECHO["Unary"], StringValue(value=value), **options)
    return answer.value


async def test_a_call_and_its_answer(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    expected = "00000015 00000001 01 00" + "0a06742e4563686f" + "1205556e617279" + "1a040a026869"
    assert await peer.exactly(31) == bytes.fromhex(expected)
    await peer.send(bytes.fromhex("00000007 00000001 02 00 12050a03796573"))
    assert await call == "yes"


async def test_metadata_and_timeout(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    metadata = {"Containerd-Namespace-ttrpc": "k8s.io", "many": ["1", "2"]}
    call = asyncio.create_task(unary(client, "", metadata=metadata, timeout_s=3))
    body = (await peer.frame()).data
    head = field(1, b"t.Echo") + field(2, b"Unary")
    pairs = b"".join(
        field(5, field(1, key) + field(2, value))
        for key, value in ((b"containerd-namespace-ttrpc", b"k8s.io"), (b"many", b"1"), (b"many", b"2"))
    )
    assert body.startswith(head + b"\x20")
    assert body.endswith(pairs)
    timeout_nano = sum(
        (byte & 0x7F) << (7 * i) for i, byte in enumerate(body[len(head) + 1 : len(body) - len(pairs)])
    )
    assert 2_000_000_000 < timeout_nano <= 3_000_000_000
    await peer.send(response(1))
    assert await call == ""


async def test_ids_are_odd_and_rise(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client)) for _ in range(4)]
    assert [request.stream_id for request in await peer.frames(4)] == [1, 3, 5, 7]
    await peer.send(*(response(stream_id) for stream_id in (1, 3, 5, 7)))
    await asyncio.gather(*calls)


async def test_answers_in_any_order_and_torn(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client)) for _ in range(3)]
    await peer.frames(3)
    for byte in b"".join(response(stream_id, text(str(stream_id))) for stream_id in (5, 1, 3)):
        await peer.send(bytes([byte]))
        await asyncio.sleep(0)
    assert await asyncio.gather(*calls) == ["1", "3", "5"]


async def test_an_empty_body_is_success(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(bytes.fromhex("00000000 00000001 02 00"))
    assert await call == ""


async def test_status_zero_is_success(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(bytes.fromhex("00000008 00000001 02 00 0a00 12040a027879"))
    assert await call == "xy"


async def test_an_error_status_with_details(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(frame(1, RESPONSE, 0, bytes.fromhex("0a11 0805 12056e6f206331 1a06 0a0174 120176")))
    with pytest.raises(RpcError, match=r"^no c1$") as caught:
        await call
    assert caught.value.code is Code.NOT_FOUND
    assert [(detail.type_url, detail.value) for detail in caught.value.details] == [("t", b"v")]


async def test_an_unknown_code_is_an_error(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(frame(1, RESPONSE, 0, status_body(99, "strange")))
    with pytest.raises(RpcError, match="strange") as caught:
        await call
    assert caught.value.code is Code.UNKNOWN


@pytest.mark.parametrize("body", [b"\xff", field(2, b"\x0a\x7f")], ids=["response", "payload"])
async def test_a_malformed_answer_fails_only_its_call(client_and_peer: Pair, body: bytes) -> None:
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client)) for _ in range(2)]
    await peer.frames(2)
    await peer.send(frame(1, RESPONSE, 0, body), response(3, text("fine")))
    with pytest.raises(RpcError, match="malformed") as caught:
        await calls[0]
    assert caught.value.code is Code.INTERNAL
    assert await calls[1] == "fine"


async def test_an_oversized_answer_fails_only_its_call(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client)) for _ in range(2)]
    await peer.frames(2)
    await peer.send(frame(1, RESPONSE, 0, bytes(LIMIT + 1)), response(3, text("fine")))
    with pytest.raises(RpcError, match="message of 4194305 bytes") as caught:
        await calls[0]
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert await calls[1] == "fine"


async def test_an_oversized_request_is_not_sent_and_takes_no_id(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    with pytest.raises(RpcError, match="over the limit") as caught:
        await unary(client, "x" * LIMIT)
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    call = asyncio.create_task(unary(client))
    assert (await peer.frame()).stream_id == 1
    await peer.send(response(1))
    await call


async def test_stray_frames_are_ignored(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(
        response(99), response(2), frame(99, DATA, 0, b"x"), frame(1, 1, 0, b""), frame(1, 200, 9, b"?")
    )
    await peer.send(frame(99, RESPONSE, 0, bytes(LIMIT + 1)), frame(1, 77, 0, bytes(LIMIT + 1)), response(1))
    assert await call == ""


async def test_stream_data_in_answer_to_a_unary_call(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(frame(1, DATA, 0, text("x")))
    with pytest.raises(RpcError, match="unary call with stream data"):
        await call


async def test_a_timeout_ends_the_call_and_a_late_answer_is_ignored(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    with pytest.raises(RpcError, match="deadline exceeded") as caught:
        await unary(client, timeout_s=0.02)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await peer.frame()
    call = asyncio.create_task(unary(client))
    assert (await peer.frame()).stream_id == 3
    await peer.send(response(1, text("late")), response(3, text("mine")))
    assert await call == "mine"


@pytest.mark.parametrize("timeout_s", [0, -1])
async def test_a_timeout_that_is_over_sends_nothing(client_and_peer: Pair, timeout_s: float) -> None:
    client, peer = client_and_peer
    with pytest.raises(RpcError, match="deadline exceeded"):
        await unary(client, timeout_s=timeout_s)
    with pytest.raises(RpcError, match="deadline exceeded"):
        async with client.stream("t.Echo", ECHO["Both"], timeout_s=timeout_s):
            raise AssertionError
    await client.aclose()
    assert await peer.at_end()


async def test_an_infinite_timeout_is_none(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client, "", timeout_s=float("inf")))
    assert (await peer.frame()).data == field(1, b"t.Echo") + field(2, b"Unary")
    await peer.send(response(1))
    await call


async def test_a_timeout_beyond_the_number_range_is_cut(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client, "", timeout_s=1e300))
    assert (await peer.frame()).data.endswith(b"\x20" + b"\xff" * 8 + b"\x7f")
    await peer.send(response(1))
    await call


async def test_a_cancelled_call_is_forgotten(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client)) for _ in range(2)]
    await peer.frames(2)
    calls[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await calls[0]
    await peer.send(response(1), response(3, text("other")))
    assert await calls[1] == "other"


@pytest.mark.parametrize("closer", ["client", "server"])
async def test_closing_fails_every_pending_call(client_and_peer: Pair, closer: str) -> None:
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client)) for _ in range(50)]
    await peer.frames(50)
    waiter = asyncio.create_task(client.wait_closed())
    if closer == "client":
        await client.aclose()
    else:
        peer.close()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in errors} == {ConnectionClosed}
    assert len({id(error) for error in errors}) == 50
    await waiter
    assert client.closed


async def test_calls_on_a_closed_client(client_and_peer: Pair) -> None:
    client, _ = client_and_peer
    await client.aclose()
    await client.aclose()
    with pytest.raises(ConnectionClosed, match=r"^ttrpc: closed$"):
        await unary(client)
    with pytest.raises(ConnectionClosed):
        async with client.stream("t.Echo", ECHO["Both"]):
            raise AssertionError


async def test_closing_and_cancelling_at_once_reports_nothing_twice(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    call = asyncio.create_task(unary(client))
    await peer.frame()
    closing = asyncio.create_task(client.aclose())
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await closing
    gc.collect()
    assert reports == []


async def test_an_answer_that_is_cut_off_fails_the_call(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(response(1, text("hello"))[:-1])
    peer.close()
    with pytest.raises(ConnectionClosed):
        await call


async def test_the_cause_of_a_closed_connection_is_kept(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    call = asyncio.create_task(unary(client))
    await asyncio.sleep(0)
    await peer.exactly(1)
    peer.close()  # with unread data, which is a reset for the other side
    with pytest.raises(ConnectionClosed) as caught:
        await call
    assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_a_slow_server_makes_callers_wait(client_and_peer: Pair) -> None:
    """Requests stay with their callers, and not in a buffer, until the server reads; then all go through."""
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client, "x" * 500_000)) for _ in range(40)]
    done, _ = await asyncio.wait(calls, timeout=0.1)
    assert not done
    with pytest.raises(RpcError, match="deadline exceeded"):
        await unary(client, timeout_s=0.02)
    for stream_id in range(1, 80, 2):
        request = await peer.frame()
        assert request.stream_id == stream_id
        await peer.send(response(stream_id))
    await asyncio.gather(*calls)


async def test_callers_that_wait_to_send_see_the_end(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    calls = [asyncio.create_task(unary(client, "x" * 500_000)) for _ in range(40)]
    await peer.exactly(1)
    await client.aclose()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(error) for error in errors} == {ConnectionClosed}


async def test_a_client_stream(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Up"]) as stream:
        assert await peer.exactly(22) == bytes.fromhex("0000000c 00000001 01 02 0a06742e4563686f 12025570")
        await stream.send(StringValue(value="a"))
        assert await peer.exactly(13) == bytes.fromhex("00000003 00000001 03 00 0a0161")
        await stream.send(StringValue())
        assert await peer.exactly(10) == bytes.fromhex("00000000 00000001 03 00")
        await peer.send(response(1, text("sum")))
        assert (await anext(aiter(stream))).value == "sum"
        # Ended by the server before our side was closed: there is nothing left to close.
        await stream.close_send()
        with pytest.raises(StreamClosed):
            await stream.send(StringValue(value="late"))
    await client.aclose()
    assert await peer.at_end()


async def test_the_end_of_a_client_stream_is_a_frame_without_data(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Up"]) as stream:
        await peer.frame()
        await stream.close_send()
        await stream.close_send()
        assert await peer.exactly(10) == bytes.fromhex("00000000 00000001 03 05")
        with pytest.raises(StreamClosed):
            await stream.send(StringValue(value="late"))
        await peer.send(response(1, text("sum")))
        assert (await stream.response()).value == "sum"


LAST = [
    pytest.param([frame(1, DATA, END, b"")], ["a"], id="end alone"),
    pytest.param([frame(1, DATA, REMOTE_CLOSED, text("b"))], ["a", "b"], id="end with data"),
    pytest.param([frame(1, RESPONSE, 0, b"")], ["a"], id="empty response"),
    pytest.param([response(1, text("b"))], ["a", "b"], id="response with data"),
    pytest.param([frame(1, DATA, NO_DATA, b"x"), frame(1, DATA, END, b"")], ["a"], id="no data"),
    pytest.param([frame(1, DATA, 0, b""), frame(1, DATA, END, b"")], ["a", ""], id="empty message"),
    pytest.param([frame(1, DATA, END, b""), frame(1, RESPONSE, 0, b"")], ["a"], id="end twice"),
]


@pytest.mark.parametrize(("frames", "messages"), LAST)
async def test_a_server_stream_and_its_end(
    client_and_peer: Pair, frames: list[bytes], messages: list[str]
) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Down"], StringValue(value="x")) as stream:
        assert (await peer.frame())[:3] == (1, 1, REMOTE_CLOSED)
        await peer.send(frame(1, DATA, 0, text("a")), *frames)
        assert [message.value async for message in stream] == messages
        with pytest.raises(StreamClosed):
            await stream.send(StringValue())


async def test_an_error_after_messages(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    received = []
    async with client.stream("t.Echo", ECHO["Both"]) as stream:
        await peer.frame()
        await peer.send(frame(1, DATA, 0, text("a")), frame(1, RESPONSE, 0, status_body(5, "gone")))
        with pytest.raises(RpcError, match="gone"):
            async for message in stream:
                received.append(message.value)  # noqa: PERF401  # it ends with an error
        with pytest.raises(RpcError, match="gone"):
            await stream.send(StringValue())
    assert received == ["a"]


async def test_a_stream_fails_with_its_connection(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Both"]) as stream:
        await peer.frame()
        peer.close()
        with pytest.raises(ConnectionClosed):
            await anext(aiter(stream))
        with pytest.raises(ConnectionClosed):
            await stream.send(StringValue())
        await stream.close_send()


async def test_a_deadline_ends_a_stream(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Both"], timeout_s=0.02) as stream:
        assert b"\x20" in (await peer.frame()).data
        with pytest.raises(RpcError, match="deadline exceeded"):
            await anext(aiter(stream))
        with pytest.raises(RpcError, match="deadline exceeded"):
            await stream.send(StringValue())


async def test_a_deadline_ends_a_sender_that_waits(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Up"], timeout_s=0.1) as stream:
        with pytest.raises(RpcError, match="deadline exceeded"):
            while True:
                await stream.send(StringValue(value="x" * 500_000))
    await peer.exactly(1)


async def test_a_stream_that_is_left_early_is_forgotten(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Down"], StringValue()) as stream:
        await peer.frame()
        await peer.send(frame(1, DATA, 0, text("a")) * 1000)  # more than its queue takes: reading is stopped
        await anext(aiter(stream))
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(frame(1, DATA, 0, text("a")) * 1000, response(3, text("fine")))
    assert await call == "fine"


async def test_an_oversized_message_fails_only_its_stream(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Both"]) as one, client.stream("t.Echo", ECHO["Both"]) as other:
        await peer.frames(2)
        with pytest.raises(RpcError, match="over the limit"):
            await one.send(StringValue(value="x" * LIMIT))
        await one.send(StringValue(value="still open"))
        assert (await peer.frame()).data == text("still open")
        await peer.send(frame(1, DATA, 0, bytes(LIMIT + 1)), frame(3, DATA, 0, text("fine")))
        with pytest.raises(RpcError, match="over the limit"):
            await anext(aiter(one))
        assert (await anext(aiter(other))).value == "fine"


async def test_stream_data_where_one_response_is_due(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Up"]) as stream:
        await peer.frame()
        await peer.send(frame(1, DATA, 0, text("a")))
        with pytest.raises(RpcError, match="where one response is due"):
            await stream.response()


async def test_a_stream_that_ends_without_its_response(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Both"]) as stream:
        await peer.frame()
        await peer.send(frame(1, DATA, END, b""))
        with pytest.raises(RpcError, match="without a response"):
            await stream.response()


async def test_two_tasks_cannot_receive_from_one_stream(client_and_peer: Pair) -> None:
    client, peer = client_and_peer
    async with client.stream("t.Echo", ECHO["Both"]) as stream:
        await peer.frame()

        async def receive() -> str:
            message: StringValue = await anext(aiter(stream))
            return message.value

        first = asyncio.create_task(receive())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="two tasks"):
            await anext(aiter(stream))
        await peer.send(frame(1, DATA, 0, text("a")))
        assert await first == "a"


async def test_methods_and_calls_must_fit(client_and_peer: Pair) -> None:
    client, _ = client_and_peer
    with pytest.raises(ValueError, match="is a streaming method"):
        await client.call("t.Echo", ECHO["Up"], StringValue())
    with pytest.raises(ValueError, match="is a unary method"):
        client.stream("t.Echo", ECHO["Unary"], StringValue())
    with pytest.raises(ValueError, match="takes a request here"):
        client.stream("t.Echo", ECHO["Down"])
    with pytest.raises(ValueError, match="takes no request here"):
        client.stream("t.Echo", ECHO["Up"], StringValue())


async def test_only_stream_sockets() -> None:
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with datagram, pytest.raises(ValueError, match="needs a stream socket"):
        Client.from_socket(datagram)


async def test_used_up_ids(client_and_peer: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    client, peer = client_and_peer
    monkeypatch.setattr("ttrpc.client_connection.MAX_STREAM_ID", 1)
    call = asyncio.create_task(unary(client))
    await peer.frame()
    await peer.send(response(1))
    await call
    with pytest.raises(RpcError, match="ids of this connection are used up"):
        await unary(client)
