"""What the server answers to unary requests, byte by byte."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.wrappers_pb2 import StringValue

from tests.unit.ttrpc.peer import (
    DATA,
    ECHO,
    LIMIT,
    REQUEST,
    RESPONSE,
    Frame,
    Peer,
    failure,
    field,
    frame,
    request,
    request_body,
    text,
)
from ttrpc import Call, Code, RpcError, Server, Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from ttrpc import Next

    Connect = Callable[[Server], AbstractAsyncContextManager[Peer]]

# A call of t.Echo/Unary with StringValue "hi" on stream 1, and its answer.
CALL = bytes.fromhex("00000015 00000001 01 00" + "0a06742e4563686f" + "1205556e617279" + "1a040a026869")
ANSWER = Frame(1, 2, 0, bytes.fromhex("12040a026869"))


async def echo(message: StringValue, call: Call) -> StringValue:
    return message


async def forever(message: StringValue, call: Call) -> StringValue:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


def echo_server(handler: Callable[..., Awaitable[Any]] = echo, **options: Any) -> Server:
    server = Server(**options)
    server.register(ECHO, {"Unary": handler})
    return server


def raising(error: BaseException) -> Callable[..., Awaitable[Any]]:
    async def handler(message: StringValue, call: Call) -> StringValue:
        raise error

    return handler


async def test_a_call_and_its_answer(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(CALL)
        assert await peer.frame() == ANSWER


async def test_one_byte_at_a_time(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        for byte in CALL:
            await peer.send(bytes([byte]))
            await asyncio.sleep(0)
        assert await peer.frame() == ANSWER


async def test_several_requests_in_one_read(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(*(request(stream_id, "Unary", text(str(stream_id))) for stream_id in (1, 3, 5)))
        answers = await peer.frames(3)
    assert sorted(answers) == [Frame(i, RESPONSE, 0, field(2, text(str(i)))) for i in (1, 3, 5)]


async def test_an_empty_reply_is_an_empty_body(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(request(1, "Unary"))
        assert await peer.exactly(10) == bytes.fromhex("00000000 00000001 02 00")


async def test_answers_come_in_the_order_of_being_ready(connect: Connect) -> None:
    go = asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        if message.value == "slow":
            await go.wait()
        return message

    async with connect(echo_server(handler)) as peer:
        await peer.send(request(1, "Unary", text("slow")), request(3, "Unary", text("fast")))
        assert (await peer.frame()).stream_id == 3
        go.set()
        assert (await peer.frame()).stream_id == 1


@pytest.mark.parametrize(
    ("service", "method", "message"),
    [("t.Nope", "Unary", "service t.Nope"), ("", "", "service "), ("t.Echo", "Nope", "method Nope"),
     ("t.Echo", "Missing", "method Missing")],
)  # fmt: skip
async def test_unknown_names(connect: Connect, service: str, method: str, message: str) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(frame(1, REQUEST, 0, request_body(method, service=service)))
        assert await peer.frame() == failure(1, 12, message)


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x7f", b"\x0a\x02\xff\xfe"], ids=["tag", "cut", "not utf-8"])
async def test_a_malformed_request_is_answered_and_the_connection_lives(
    connect: Connect, body: bytes
) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(frame(1, REQUEST, 0, body), request(3, "Unary", text("x")))
        answers = {answer.stream_id: answer.data for answer in await peer.frames(2)}
    assert answers[1][2:4] == b"\x08\x03"
    assert b"malformed ttrpc.Request" in answers[1]
    assert answers[3] == field(2, text("x"))


async def test_a_malformed_payload_is_answered(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(request(1, "Unary", b"\x0a\x7f"))
        answer = await peer.frame()
    assert b"\x08\x03\x12" in answer.data[:6]
    assert b"malformed google.protobuf.StringValue" in answer.data


@pytest.mark.parametrize("stream_id", [0, 2, 0xFFFFFFFE])
async def test_even_ids_are_refused(connect: Connect, stream_id: int) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(request(stream_id, "Unary"), request(1, "Unary"))
        assert await peer.frame() == failure(stream_id, 3, "stream id of a client must be odd")
        assert await peer.frame() == Frame(1, RESPONSE, 0, b"")


@pytest.mark.parametrize("stream_id", [5, 3])
async def test_ids_must_rise(connect: Connect, stream_id: int) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(request(5, "Unary"))
        assert await peer.frame() == Frame(5, RESPONSE, 0, b"")
        await peer.send(request(stream_id, "Unary"), request(7, "Unary"))
        assert await peer.frame() == failure(stream_id, 3, "stream id must be higher than those before it")
        assert await peer.frame() == Frame(7, RESPONSE, 0, b"")


async def test_ids_may_skip_and_go_to_the_last(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(request(99, "Unary"), request(0xFFFFFFFF, "Unary"))
        assert sorted(answer.stream_id for answer in await peer.frames(2)) == [99, 0xFFFFFFFF]


@pytest.mark.parametrize("kind", [0, 2, 4, 255])
@pytest.mark.parametrize("stream_id", [1, 2])
async def test_unknown_types_are_ignored(connect: Connect, kind: int, stream_id: int) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(frame(stream_id, kind, 255, b"what is this"), CALL)
        assert await peer.frame() == ANSWER


async def test_an_oversized_frame_of_unknown_type_is_skipped(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(frame(1, 9, 0, bytes(LIMIT + 1)), CALL)
        assert await peer.frame() == ANSWER


async def test_an_oversized_request_is_answered_and_the_connection_lives(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(frame(1, REQUEST, 0, bytes(LIMIT + 1)), request(3, "Unary", text("x")))
        refused = failure(1, 8, "message of 4194305 bytes is over the limit of 4194304 bytes")
        assert await peer.frame() == refused
        assert await peer.frame() == Frame(3, RESPONSE, 0, field(2, text("x")))


async def test_an_oversized_request_uses_up_its_id(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(frame(5, REQUEST, 0, bytes(LIMIT + 1)), frame(3, REQUEST, 0, bytes(LIMIT + 1)))
        assert (await peer.frame()).data[2:4] == b"\x08\x08"
        assert await peer.frame() == failure(3, 3, "stream id must be higher than those before it")


async def test_an_oversized_response_becomes_an_error(connect: Connect) -> None:
    async def huge(message: StringValue, call: Call) -> StringValue:
        return StringValue(value="x" * LIMIT)

    async with connect(echo_server(huge)) as peer:
        await peer.send(request(1, "Unary"))
        answer = await peer.frame()
    assert answer.data[2:4] == b"\x08\x08"
    assert b"over the limit of 4194304 bytes" in answer.data


async def test_an_oversized_error_becomes_a_smaller_one(connect: Connect) -> None:
    async with connect(echo_server(raising(RpcError(Code.NOT_FOUND, "x" * LIMIT)))) as peer:
        await peer.send(request(1, "Unary"))
        answer = await peer.frame()
    assert answer.data[2:4] == b"\x08\x08"


async def test_a_deadline_ends_the_handler(connect: Connect) -> None:
    ended: list[str] = []

    async def handler(message: StringValue, call: Call) -> StringValue:
        assert call.deadline is not None
        assert 0 < call.deadline - asyncio.get_running_loop().time() <= 0.02
        try:
            return await forever(message, call)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with connect(echo_server(handler)) as peer:
        await peer.send(request(1, "Unary", timeout_nano=20_000_000))
        assert await peer.frame() == failure(1, 4, "deadline exceeded")
    assert ended == ["cancelled"]


async def test_a_deadline_that_is_over_does_not_start_the_handler(connect: Connect) -> None:
    body = request_body("Unary") + b"\x20" + b"\xff" * 9 + b"\x01"  # timeout_nano -1
    async with connect(echo_server(raising(AssertionError("called")))) as peer:
        await peer.send(frame(1, REQUEST, 0, body))
        assert await peer.frame() == failure(1, 4, "deadline exceeded")


async def test_the_longest_timeout_is_no_problem(connect: Connect) -> None:
    async with connect(echo_server()) as peer:
        await peer.send(request(1, "Unary", text("x"), timeout_nano=2**63 - 1))
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text("x")))


async def test_metadata_reaches_the_handler(connect: Connect) -> None:
    seen: list[Call] = []

    async def handler(message: StringValue, call: Call) -> StringValue:
        seen.append(call)
        return message

    body = request_body("Unary", metadata=(("Trace", "1"), ("ns", "k8s.io"), ("trace", "2"), ("empty", "")))
    async with connect(echo_server(handler)) as peer:
        await peer.send(frame(1, REQUEST, 0, body))
        await peer.frame()
    assert (seen[0].service, seen[0].method, seen[0].deadline) == ("t.Echo", "Unary", None)
    assert seen[0].metadata == {"trace": ("1", "2"), "ns": ("k8s.io",), "empty": ("",)}


async def test_a_status_goes_out_with_its_details(connect: Connect) -> None:
    error = RpcError(Code.NOT_FOUND, "no c1", [AnyMessage(type_url="t", value=b"v")])
    async with connect(echo_server(raising(error))) as peer:
        await peer.send(request(1, "Unary"))
        # Response{status{code 5, message "no c1", details{type_url "t", value "v"}}}
        assert (await peer.frame()).data == bytes.fromhex("0a11 0805 12056e6f206331 1a06 0a0174 120176")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (RpcError(Code.ABORTED, "later"), 10, "later"),
        (TimeoutError("of its own"), 4, "deadline exceeded"),
        (KeyError("k"), 5, "hook: 'k'"),
    ],
)
async def test_errors_of_handlers(connect: Connect, error: Exception, code: int, message: str) -> None:
    server = echo_server(raising(error), error_status=lambda error: Status(Code.NOT_FOUND, f"hook: {error}"))
    async with connect(server) as peer:
        await peer.send(request(1, "Unary"))
        assert await peer.frame() == failure(1, code, message)


async def test_an_unexpected_error_is_logged_and_kept_from_the_client(
    connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    async with connect(echo_server(raising(KeyError("secret")))) as peer:
        await peer.send(request(1, "Unary"))
        assert await peer.frame() == failure(1, 13, "internal error (KeyError)")
    [record] = caplog.records
    assert record.getMessage() == "handler of t.Echo/Unary failed"
    assert record.exc_info is not None
    assert repr(record.exc_info[1]) == "KeyError('secret')"


def failing_hook(error: Exception) -> Status:
    raise LookupError("hook")


@pytest.mark.parametrize(
    ("hook", "name"),
    [(failing_hook, "LookupError"), (lambda _: Status(Code.OK), "KeyError")],
    ids=["raises", "ok"],
)
async def test_a_bad_error_hook_is_an_internal_error(
    connect: Connect, caplog: pytest.LogCaptureFixture, hook: Callable[[Exception], Status], name: str
) -> None:
    async with connect(echo_server(raising(KeyError("k")), error_status=hook)) as peer:
        await peer.send(request(1, "Unary"))
        assert await peer.frame() == failure(1, 13, f"internal error ({name})")
    assert len(caplog.records) == 1


@pytest.mark.parametrize("result", [None, "text", Status(Code.OK)])
async def test_a_handler_that_returns_nonsense_is_an_internal_error(
    connect: Connect, caplog: pytest.LogCaptureFixture, result: Any
) -> None:
    async def handler(message: StringValue, call: Call) -> Any:
        return result

    async with connect(echo_server(handler)) as peer:
        await peer.send(request(1, "Unary"))
        assert await peer.frame() == failure(1, 13, "internal error (TypeError)")
    assert "its method returns StringValue" in caplog.text


async def test_a_handler_that_cancels_itself_is_answered(connect: Connect) -> None:
    async with connect(echo_server(raising(asyncio.CancelledError()))) as peer:
        await peer.send(request(1, "Unary"))
        assert await peer.frame() == failure(1, 1, "call was cancelled by the server")


async def test_an_error_reaches_no_other_call(connect: Connect, caplog: pytest.LogCaptureFixture) -> None:
    go = asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        if message.value == "bad":
            go.set()
            raise ZeroDivisionError
        await go.wait()
        return message

    async with connect(echo_server(handler)) as peer:
        await peer.send(request(1, "Unary", text("good")), request(3, "Unary", text("bad")))
        answers = {answer.stream_id: answer for answer in await peer.frames(2)}
    assert answers[1].data == field(2, text("good"))
    assert answers[3] == failure(3, 13, "internal error (ZeroDivisionError)")


async def test_too_many_calls_at_once(connect: Connect) -> None:
    go = asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        await go.wait()
        return message

    server = echo_server(handler, max_concurrent_calls=2)
    async with connect(server) as peer:
        await peer.send(*(request(stream_id, "Unary") for stream_id in (1, 3, 5)))
        assert await peer.frame() == failure(5, 8, "connection has 2 calls running, which is its limit")
        assert server.active_calls == 2
        go.set()
        assert sorted(answer.stream_id for answer in await peer.frames(2)) == [1, 3]
        await peer.send(request(7, "Unary"))
        assert await peer.frame() == Frame(7, RESPONSE, 0, b"")
    assert server.active_calls == 0


async def test_refused_requests_do_not_count_as_calls(connect: Connect) -> None:
    server = echo_server()
    async with connect(server) as peer:
        await peer.send(request(2, "Unary"), request(1, "Nope"), frame(3, REQUEST, 0, b"\xff"))
        await peer.frames(3)
        assert server.active_calls == 0


async def test_handlers_are_cancelled_when_the_client_goes(connect: Connect) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        started.set()
        try:
            return await forever(message, call)
        finally:
            ended.set()

    server = echo_server(handler)
    async with connect(server) as peer:
        await peer.send(request(1, "Unary"))
        await started.wait()
        peer.close()
        await ended.wait()
        await asyncio.sleep(0)
        assert server.active_calls == 0


async def test_a_handler_that_ignores_its_cancellation_harms_nobody(connect: Connect) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        started.set()
        try:
            return await forever(message, call)
        except asyncio.CancelledError:
            ended.set()
            return message

    async with connect(echo_server(handler)) as peer:
        await peer.send(request(1, "Unary"))
        await started.wait()
        peer.close()
        await ended.wait()


async def test_data_on_a_unary_call_ends_it(connect: Connect) -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        started.set()
        try:
            return await forever(message, call)
        finally:
            ended.set()

    async with connect(echo_server(handler)) as peer:
        await peer.send(request(1, "Unary"))
        await started.wait()
        await peer.send(frame(1, DATA, 0, text("x")))
        expected = failure(1, 3, "data on a stream whose method takes a single request")
        assert await peer.frame() == expected
        await ended.wait()
        await peer.send(request(3, "Nope"))
        assert await peer.frame() == failure(3, 12, "method Nope")  # and nothing else about stream 1


async def test_the_interceptor_sees_and_may_change_everything(connect: Connect) -> None:
    seen: list[str] = []

    async def interceptor(call: Call, message: Any, proceed: Next) -> Any:
        seen.append(f"{call.service}/{call.method} {message.value}")
        answer = await proceed(StringValue(value=message.value + "+"), call)
        return StringValue(value=answer.value + "-")

    async with connect(echo_server(interceptor=interceptor)) as peer:
        await peer.send(request(1, "Unary", text("a")))
        assert await peer.frame() == Frame(1, RESPONSE, 0, field(2, text("a+-")))
    assert seen == ["t.Echo/Unary a"]


async def test_the_interceptor_can_fail_the_nth_call(connect: Connect) -> None:
    counts: dict[str, int] = {}

    async def interceptor(call: Call, message: Any, proceed: Next) -> Any:
        counts[call.method] = counts.get(call.method, 0) + 1
        if counts[call.method] == 2:
            raise RpcError(Code.UNAVAILABLE, "injected")
        return await proceed(message, call)

    async with connect(echo_server(interceptor=interceptor)) as peer:
        for stream_id in (1, 3, 5):
            await peer.send(request(stream_id, "Unary"))
        answers = sorted(await peer.frames(3))
    assert answers == [Frame(1, 2, 0, b""), failure(3, 14, "injected"), Frame(5, 2, 0, b"")]


async def test_a_client_that_does_not_read_is_not_read_from(connect: Connect) -> None:
    """Its answers, and then its requests, stay in the sockets; only a bounded part of them gets in."""
    started = 0

    async def handler(message: StringValue, call: Call) -> StringValue:
        nonlocal started
        started += 1
        return StringValue(value="x" * 500_000)

    server = echo_server(handler)
    async with connect(server) as peer:
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while sent < 1000:
                await peer.send(request(2 * sent + 1, "Unary", text("y" * 50_000)))
                sent += 1

        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await flood()
        assert sent < 100
        assert started < 100
        reading = await peer.frames(sent)
        assert {len(answer.data) for answer in reading} == {500_008}
