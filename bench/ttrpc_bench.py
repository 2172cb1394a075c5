"""How much ttrpc costs over the socket it runs on.

Client and server share one process and one event loop, so every number is the cost of both ends together. The
floor is measured in turn with it: two bare asyncio protocols over the same kind of socket pair that pass the same
number of bytes back and forth, with nothing parsed and no task started.

    python -m bench.ttrpc_bench
"""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from google.protobuf.wrappers_pb2 import BytesValue

from ttrpc import Call, Client, Method, Server, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Exchange = Callable[[], Awaitable[object]]

SMALL = 64
LARGE = 256 * 1024
ROUNDS = 5
CALLS = 2000
LARGE_CALLS = 100

ECHO = Method("Echo", BytesValue, BytesValue)
SERVICE = Service("bench.Echo", (ECHO,))


async def echo(message: BytesValue, call: Call) -> BytesValue:
    return message


@asynccontextmanager
async def ttrpc_exchange(size: int) -> AsyncIterator[Exchange]:
    """A unary call with a payload of `size` bytes and the same back."""
    ours, theirs = socket.socketpair()
    server = Server()
    server.register(SERVICE, {"Echo": echo})
    serving = asyncio.create_task(server.serve_connection(theirs))
    message = BytesValue(value=bytes(size))
    async with Client.from_socket(ours) as client:
        yield lambda: client.call("bench.Echo", ECHO, message)
    await serving


class BareServer(asyncio.BufferedProtocol):
    """Sends back whatever arrives."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(64 * 1024))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._transport.write(bytes(self._buffer[:nbytes]))


class BareClient(BareServer):
    """Sends `size` bytes per exchange; an exchange is over when as many bytes are back."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._message = bytes(size)
        self._missing = size
        self._waiting: deque[asyncio.Future[None]] = deque()

    def exchange(self) -> Awaitable[None]:
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._transport.write(self._message)
        return done

    def buffer_updated(self, nbytes: int) -> None:
        self._missing -= nbytes
        while self._missing <= 0:
            self._missing += len(self._message)
            self._waiting.popleft().set_result(None)


@asynccontextmanager
async def bare_exchange(size: int) -> AsyncIterator[Exchange]:
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    server, _ = await loop.create_connection(BareServer, sock=theirs)
    transport, client = await loop.create_connection(lambda: BareClient(size), sock=ours)
    yield client.exchange
    transport.close()
    server.close()
    await asyncio.sleep(0)


async def seconds(exchange: Exchange, count: int, concurrency: int) -> float:
    """How long `count` exchanges take, `concurrency` of them at a time."""

    async def worker() -> None:
        for _ in range(count // concurrency):
            await exchange()

    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return (time.perf_counter() - start) * count / (count // concurrency * concurrency)


async def latencies(exchange: Exchange, count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        await exchange()
        found.append(time.perf_counter() - start)
    return found


async def measure() -> dict[str, float]:
    """The median of `ROUNDS` rounds, in each of which everything is measured once."""
    makers = {"ttrpc": ttrpc_exchange, "floor": bare_exchange}
    rounds: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, maker in makers.items():
            async with maker(SMALL) as exchange:
                await seconds(exchange, 200, 1)
                one = await seconds(exchange, CALLS, 1)
                many = await seconds(exchange, CALLS, 64)
                single = statistics.quantiles(await latencies(exchange, CALLS), n=20)
            async with maker(LARGE) as exchange:
                large = await seconds(exchange, LARGE_CALLS, 4)
            found = {
                "calls_per_s_at_1": CALLS / one,
                "calls_per_s_at_64": CALLS / many,
                "mb_per_s_256kib": LARGE_CALLS * LARGE / large / 1e6,
                "latency_p50_us": single[9] * 1e6,
                "latency_p95_us": single[18] * 1e6,
            }
            for kind, value in found.items():
                rounds.setdefault(f"{name}_{kind}", []).append(value)
    return {name: statistics.median(values) for name, values in rounds.items()}


def run() -> dict[str, float]:
    """Calls, or for the floor exchanges, per second with 64 byte payloads; MB/s one way with 256 KiB; and times.

    `ratio_*` is how many times slower ttrpc is than the floor.
    """
    found = asyncio.run(measure())
    ratios = {}
    for name, value in found.items():
        kind = name.removeprefix("ttrpc_")
        if kind != name:
            floor = found[f"floor_{kind}"]
            ratios[f"ratio_{kind}"] = value / floor if kind.startswith("latency") else floor / value
    return found | ratios


def main() -> None:
    found = run()
    print(f"{'':24}{'ttrpc':>12}{'floor':>12}{'ratio':>8}")
    for name in found:
        kind = name.removeprefix("ratio_")
        if kind != name:
            print(f"{kind:24}{found[f'ttrpc_{kind}']:12.0f}{found[f'floor_{kind}']:12.0f}{found[name]:8.2f}")


if __name__ == "__main__":
    main()
