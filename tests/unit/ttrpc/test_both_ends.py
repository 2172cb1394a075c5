"""Client and server together: concurrency, deadlines, streams of every kind, back-pressure."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.wrappers_pb2 import StringValue

from tests.unit.ttrpc.peer import ECHO, LIMIT
from ttrpc import Call, Client, Code, RpcError, Server, StreamClosed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    ClientOf = Callable[[Server], Client]


async def echo(message: StringValue, call: Call) -> StringValue:
    return message


async def total(messages: AsyncIterator[StringValue], call: Call) -> StringValue:
    return StringValue(value=str(sum([len(message.value) async for message in messages])))


async def count(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
    for number in range(int(message.value)):
        yield StringValue(value=str(number))


async def echo_all(messages: AsyncIterator[StringValue], call: Call) -> AsyncIterator[StringValue]:
    async for message in messages:
        yield message


def full_server(**handlers: Any) -> Server:
    server = Server()
    server.register(ECHO, {"Unary": echo, "Up": total, "Down": count, "Both": echo_all, **handlers})
    return server


async def unary(client: Client, value: str, **options: Any) -> str:
    answer: StringValue = await client.call("t.Echo", ECHO["Unary"], StringValue(value=value), **options)
    return answer.value


async def test_two_thousand_calls_at_once(client_of: ClientOf) -> None:
    """As for hundreds of processes, with a wait and two streams each."""
    all_in = asyncio.Event()
    server: Server

    async def handler(message: StringValue, call: Call) -> StringValue:
        if server.active_calls == 2000:
            all_in.set()
        await all_in.wait()
        return message

    server = full_server(Unary=handler)
    client = client_of(server)
    values = [str(number) for number in range(2000)]
    assert await asyncio.gather(*(unary(client, value) for value in values)) == values
    assert server.active_calls == 0


async def test_large_messages_among_small_ones(client_of: ClientOf) -> None:
    client = client_of(full_server())
    values = [str(i) * (LIMIT - 100 if i % 4 == 0 else 10) for i in range(10)]
    assert await asyncio.gather(*(unary(client, value) for value in values)) == values


async def test_cancelled_calls_leave_the_others_alone(client_of: ClientOf) -> None:
    go = asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        await go.wait()
        return message

    client = client_of(full_server(Unary=handler))
    calls = [asyncio.create_task(unary(client, str(number))) for number in range(100)]
    await asyncio.sleep(0)
    for call in calls[::2]:
        call.cancel()
    await asyncio.wait(calls[::2])
    go.set()
    assert await asyncio.gather(*calls[1::2]) == [str(number) for number in range(1, 100, 2)]


async def test_a_deadline_is_kept_on_both_sides(client_of: ClientOf) -> None:
    ended = asyncio.Event()

    async def handler(message: StringValue, call: Call) -> StringValue:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.set()
        raise AssertionError

    client = client_of(full_server(Unary=handler))
    with pytest.raises(RpcError) as caught:
        await unary(client, "x", timeout_s=0.05)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await ended.wait()


async def test_metadata_arrives(client_of: ClientOf) -> None:
    async def handler(message: StringValue, call: Call) -> StringValue:
        return StringValue(value=repr(dict(call.metadata)))

    client = client_of(full_server(Unary=handler))
    metadata = {"Ns": "k8s.io", "many": ("1", "2"), "none": ()}
    assert await unary(client, "", metadata=metadata) == "{'ns': ('k8s.io',), 'many': ('1', '2')}"


async def test_a_server_that_calls_another_server_passes_its_errors_on(client_of: ClientOf) -> None:
    async def failing(message: StringValue, call: Call) -> StringValue:
        raise RpcError(Code.NOT_FOUND, "in the guest")

    behind = client_of(full_server(Unary=failing))

    async def forward(message: StringValue, call: Call) -> StringValue:
        return await behind.call("t.Echo", ECHO["Unary"], message)

    with pytest.raises(RpcError, match="in the guest") as caught:
        await unary(client_of(full_server(Unary=forward)), "x")
    assert caught.value.code is Code.NOT_FOUND


async def test_streams_of_every_kind_at_once(client_of: ClientOf) -> None:
    client = client_of(full_server())

    async def up(size: int) -> str:
        async with client.stream("t.Echo", ECHO["Up"]) as stream:
            for _ in range(size):
                await stream.send(StringValue(value="xyz"))
            answer: StringValue = await stream.response()
            return answer.value

    async def down(size: int) -> list[str]:
        async with client.stream("t.Echo", ECHO["Down"], StringValue(value=str(size))) as stream:
            return [message.value async for message in stream]

    async def both(size: int) -> list[str]:
        async with client.stream("t.Echo", ECHO["Both"]) as stream:

            async def send() -> None:
                for number in range(size):
                    await stream.send(StringValue(value=str(number)))
                await stream.close_send()

            sending = asyncio.create_task(send())
            received = [message.value async for message in stream]
            await sending
            return received

    numbers = [str(number) for number in range(300)]
    results = await asyncio.gather(*(kind(300) for kind in (up, down, both) * 5), unary(client, "x"))
    assert results == ["900", numbers, numbers] * 5 + ["x"]


async def test_ping_pong_on_a_stream(client_of: ClientOf) -> None:
    client = client_of(full_server())
    async with client.stream("t.Echo", ECHO["Both"]) as stream:
        answers = aiter(stream)
        for number in range(50):
            await stream.send(StringValue(value=str(number)))
            assert (await anext(answers)).value == str(number)
        await stream.close_send()
        with pytest.raises(StopAsyncIteration):
            await anext(answers)


async def test_an_early_answer_stops_the_sender(client_of: ClientOf) -> None:
    async def first(messages: AsyncIterator[StringValue], call: Call) -> StringValue:
        return await anext(messages)

    client = client_of(full_server(Up=first))
    async with client.stream("t.Echo", ECHO["Up"]) as stream:
        with pytest.raises(StreamClosed):
            while True:
                await stream.send(StringValue(value="a"))
                await asyncio.sleep(0)
        assert (await stream.response()).value == "a"
    assert await unary(client, "still fine") == "still fine"


async def test_a_slow_consumer_stops_the_server(client_of: ClientOf) -> None:
    produced = 0

    async def endless(message: StringValue, call: Call) -> AsyncIterator[StringValue]:
        nonlocal produced
        while True:
            produced += 1
            yield StringValue(value="x" * 100_000)

    client = client_of(full_server(Down=endless))
    async with client.stream("t.Echo", ECHO["Down"], StringValue(), timeout_s=30) as stream:
        messages = aiter(stream)
        await anext(messages)
        await asyncio.sleep(0.2)  # time for the server to produce far more, if nothing stopped it
        before = produced
        assert before < 60
        for _ in range(100):
            await anext(messages)
        assert produced > before
