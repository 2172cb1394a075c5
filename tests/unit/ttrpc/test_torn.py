"""Calls and streams side by side over a connection that tears every frame, and slips in frames of nobody."""

from __future__ import annotations

import asyncio
import itertools
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from google.protobuf.wrappers_pb2 import StringValue
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.ttrpc.peer import DATA, ECHO, LIMIT, RESPONSE, frame
from tests.unit.ttrpc.test_fuzz import echo, echo_all, join, letters, reports_of
from ttrpc import Client, Server

if TYPE_CHECKING:
    from collections.abc import Sequence

METHODS = ("Unary", "Up", "Down", "Both")
CALLS = st.lists(st.tuples(st.sampled_from(METHODS), st.text("abc\u00e4", max_size=2000)), max_size=6)
TEARS = st.lists(st.integers(1, 3000), min_size=1, max_size=8)
# For streams that the client has not opened, or of kinds that do not exist.
STRAYS = st.lists(
    st.builds(
        frame,
        st.sampled_from([2, 1001]),
        st.sampled_from([RESPONSE, DATA, 9]),
        st.just(0),
        st.binary(max_size=50),
    ),
    max_size=3,
)
OVERSIZED = frame(1001, RESPONSE, 0, bytes(LIMIT + 1))


async def relay(source: socket.socket, sink: socket.socket, tears: Sequence[int]) -> None:
    """Pass on what comes in pieces of these sizes, again and again, and then the end."""
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):  # an end that goes takes no more, and may not have taken all
        for size in itertools.cycle(tears):
            data = await loop.sock_recv(source, size)
            if not data:
                break
            await loop.sock_sendall(sink, data)
            await asyncio.sleep(0)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


async def make(client: Client, method: str, text: str) -> str:
    """One call, one letter in a message where it streams; the answer as one text."""
    if method == "Unary":
        answer: StringValue = await client.call("t.Echo", ECHO["Unary"], StringValue(value=text))
        return answer.value
    if method == "Down":
        async with client.stream("t.Echo", ECHO["Down"], StringValue(value=text)) as messages:
            return "".join([message.value async for message in messages])
    async with client.stream("t.Echo", ECHO[method]) as stream:
        for letter in text[:50]:
            await stream.send(StringValue(value=letter))
        if method == "Up":
            whole: StringValue = await stream.response()
            return whole.value
        await stream.close_send()
        return "".join([message.value async for message in stream])


async def torn(
    calls: Sequence[tuple[str, str]], there: list[int], back: list[int], strays: list[bytes], oversized: bool
) -> None:
    server = Server()
    server.register(ECHO, {"Unary": echo, "Up": join, "Down": letters, "Both": echo_all})
    ours, near = socket.socketpair()
    far, theirs = socket.socketpair()
    for end in (near, far):
        end.setblocking(False)
    with near, far:
        serving = asyncio.create_task(server.serve_connection(theirs))
        async with Client.from_socket(ours) as client:
            # The client is asked first: what comes before it has opened a stream can be for none of them.
            making = [asyncio.create_task(make(client, method, text)) for method, text in calls]
            for stray in [*strays, OVERSIZED] if oversized else strays:
                await asyncio.get_running_loop().sock_sendall(near, stray)
            passing = [
                asyncio.create_task(relay(near, far, there)),
                asyncio.create_task(relay(far, near, back)),
            ]
            answers = await asyncio.gather(*making)
        await asyncio.gather(serving, *passing)
    sent = [(method, text if method in ("Unary", "Down") else text[:50]) for method, text in calls]
    assert answers == [",".join(text) if method == "Up" else text for method, text in sent]


@settings(max_examples=60, deadline=None)
@given(CALLS, TEARS, TEARS, STRAYS, st.booleans())
def test_what_is_torn_arrives_whole(
    calls: list[tuple[str, str]], there: list[int], back: list[int], strays: list[bytes], oversized: bool
) -> None:
    assert asyncio.run(reports_of(torn(calls, there, back, strays, oversized))) == []
