"""Gives the log to whoever connects to the log port, first what was kept, then what comes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

    from guest_agent.log import Log

_CHUNK_BYTES = 32 * 1024


async def serve(listener: socket.socket, log: Log) -> None:
    """Serve one reader after the other until cancelled; a line goes to the one who is connected then."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    news = asyncio.Event()
    log.backlog.wake = news.set
    try:
        while True:
            connection, _ = await loop.sock_accept(listener)
            with connection:
                connection.setblocking(False)
                try:
                    await _follow(loop, connection, log, news)
                except OSError as err:
                    log.info("log_reader_left", error=str(err))
    finally:
        log.backlog.wake = None
        listener.close()


async def _follow(
    loop: asyncio.AbstractEventLoop, connection: socket.socket, log: Log, news: asyncio.Event
) -> None:
    while True:
        if log.backlog.lost:
            lost, log.backlog.lost = log.backlog.lost, 0
            log.warning("log_lines_lost", lines=lost)
        data = log.backlog.take(_CHUNK_BYTES)
        if data:
            await loop.sock_sendall(connection, data)
        else:
            news.clear()
            await news.wait()
