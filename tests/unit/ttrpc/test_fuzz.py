"""Arbitrary bytes to either end: no crash, no report to the event loop, nothing left running."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from google.protobuf.wrappers_pb2 import StringValue
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.ttrpc.peer import ECHO, Peer, frame, request_body, text
from ttrpc import Call, Client, RpcError, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

# Enough of the right shape to get past the header and the names, mixed with what is not.
BODIES = st.one_of(
    st.binary(max_size=40),
    st.builds(
        request_body,
        st.sampled_from(["Unary", "Up", "Down", "Both", "Missing"]),
        st.binary(max_size=20) | st.just(text("abc")),
        timeout_nano=st.sampled_from([0, 0, 1, 2**63]),
    ),
)
FRAMES = st.builds(
    frame,
    st.integers(0, 12) | st.integers(0, 0xFFFFFFFF),
    st.integers(0, 5),
    st.integers(0, 8),
    BODIES,
    st.none() | st.none() | st.integers(0, 60),
)
BYTES = st.lists(FRAMES | st.binary(max_size=30), max_size=12).map(b"".join)


async def echo(message: StringValue, call: Call) -> StringValue:
    await asyncio.sleep(0)
    return message


async def join(messages: AsyncIterator[StringValue], call: Call) -> StringValue:
    return StringValue(value=",".join([message.value async for message in messages]))


async def letters(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
    for letter in message.value:
        yield StringValue(value=letter)


async def echo_all(messages: AsyncIterator[StringValue], call: Call) -> AsyncIterator[StringValue]:
    async for message in messages:
        yield message


async def reports_of(story: Coroutine[Any, Any, None]) -> list[dict[str, Any]]:
    """Run it, and return what reached the event loop's exception handler, and tasks that are left."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    async with asyncio.timeout(10):
        await story
    await asyncio.sleep(0)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    return reports + [{"task": task} for task in left]


async def bytes_to_a_server(data: bytes) -> None:
    server = Server()
    server.register(ECHO, {"Unary": echo, "Up": join, "Down": letters, "Both": echo_all})
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(server.serve_connection(theirs))
    peer = Peer(ours)
    await peer.send(data)
    ours.shutdown(socket.SHUT_WR)
    while await asyncio.get_running_loop().sock_recv(ours, 65536):
        pass
    await serving
    peer.close()
    assert server.active_calls == 0


async def bytes_to_a_client(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    async with Client.from_socket(ours) as client:

        async def call() -> None:
            await client.call("t.Echo", ECHO["Unary"], StringValue())

        async def stream(method: str) -> None:
            request = StringValue() if method == "Down" else None
            async with client.stream("t.Echo", ECHO[method], request) as messages:
                async for _ in messages:
                    pass

        calls = [
            asyncio.create_task(story) for story in (call(), stream("Down"), stream("Both"), stream("Up"))
        ]
        await peer.exactly(10)
        await peer.send(data)
        peer.close()
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(result is None or isinstance(result, RpcError) for result in results)


@settings(max_examples=150, deadline=None)
@given(BYTES)
def test_any_bytes_to_the_server(data: bytes) -> None:
    assert asyncio.run(reports_of(bytes_to_a_server(data))) == []


@settings(max_examples=150, deadline=None)
@given(BYTES)
def test_any_bytes_to_the_client(data: bytes) -> None:
    assert asyncio.run(reports_of(bytes_to_a_client(data))) == []
