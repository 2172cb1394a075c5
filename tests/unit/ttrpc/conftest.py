"""Connections whose one end is raw bytes, and the check that nothing of them is left after a test."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest_asyncio

from tests.unit.ttrpc.peer import Peer
from ttrpc import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from ttrpc import Server


@pytest_asyncio.fixture(autouse=True)
async def nothing_left() -> AsyncIterator[None]:
    tasks, files = asyncio.all_tasks(), set(os.listdir("/proc/self/fd"))
    yield
    # A transport closes its socket in the iteration after the one that reported its end.
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert {task for task in asyncio.all_tasks() if task not in tasks} <= {asyncio.current_task()}
    assert len(os.listdir("/proc/self/fd")) == len(files)


@asynccontextmanager
async def peer_of(server: Server) -> AsyncIterator[Peer]:
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(server.serve_connection(theirs))
    peer = Peer(ours)
    try:
        yield peer
    finally:
        peer.close()
        await server.aclose()
        await asyncio.gather(serving, return_exceptions=True)


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Callable[[Server], AbstractAsyncContextManager[Peer]]]:
    yield peer_of


@pytest_asyncio.fixture
async def client_and_peer() -> AsyncIterator[tuple[Client, Peer]]:
    ours, theirs = socket.socketpair()
    peer = Peer(theirs)
    async with Client.from_socket(ours) as client:
        yield client, peer
    peer.close()


@pytest_asyncio.fixture
async def client_of() -> AsyncIterator[Callable[[Server], Client]]:
    """A client and a server on the two ends of a socket pair."""
    async with AsyncExitStack() as stack:

        def make(server: Server) -> Client:
            ours, theirs = socket.socketpair()
            serving = asyncio.create_task(server.serve_connection(theirs))

            async def end() -> None:
                await client.aclose()
                await server.aclose()
                await serving

            client = Client.from_socket(ours)
            stack.push_async_callback(end)
            return client

        yield make
