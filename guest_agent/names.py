"""A name server of the pod's network inside the guest: questions go to the host, which knows whom to ask.

Docker gives containers the name server 127.0.0.11, which exists only in the network namespace on the host. Here that
address is the guest's own, and whatever comes there is kept until the host fetches it, and answered when the host
says so. Loaded when the host asks for it.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from guest_agent.log import Log

#: Questions without an answer yet. The oldest is forgotten for one more; its asker asks again.
MAX_WAITING = 256
MAX_CONNECTIONS = 64
#: How many questions the host gets at once.
MAX_AT_ONCE = 32
#: How long a connection may say nothing (RFC 7766 wants a few seconds).
IDLE_S = 30.0
_MAX_BYTES = 65535
_LENGTH_BYTES = 2


class NameServer:
    """Questions by UDP and TCP, each with a number by which it is answered."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._news = asyncio.Event()
        self._queue: deque[tuple[int, bool, bytes]] = deque()
        self._answers: dict[int, Callable[[bytes], None]] = {}
        self._last = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._bound: tuple[str, int] | None = None
        self._sockets: tuple[socket.socket, ...] = ()

    def listen(self, address: str, port: int) -> None:
        """Be there at the address; the second time nothing happens. Raises OSError."""
        if self._bound is not None:
            return
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            udp.bind((address, port))
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tcp.bind((address, udp.getsockname()[1]))
            tcp.listen(MAX_CONNECTIONS)
        except OSError:
            udp.close()
            tcp.close()
            raise
        loop = asyncio.get_running_loop()
        loop.add_reader(udp, self._on_datagram, udp)
        loop.add_reader(tcp, self._on_connection, tcp)
        self._bound, self._sockets = udp.getsockname(), (udp, tcp)

    def close(self) -> None:
        """Listen no longer."""
        for sock in self._sockets:
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        for task in self._tasks:
            task.cancel()

    @property
    def port(self) -> int:
        """The port, once it listens."""
        return self._bound[1] if self._bound else 0

    async def next(self, *, wait: bool) -> list[tuple[int, bool, bytes]]:
        """Questions as number, whether it came by TCP, message; waits until there are some, unless told not to."""
        while wait and not self._queue:
            self._news.clear()
            await self._news.wait()
        return [self._queue.popleft() for _ in range(min(len(self._queue), MAX_AT_ONCE))]

    def answer(self, number: int, message: bytes) -> None:
        """Answer a question; an empty message says that there is no answer. One that nobody waits for any more is no
        error."""
        reply = self._answers.pop(number, None)
        if reply is not None:
            reply(message if len(message) <= _MAX_BYTES else b"")

    def _ask(self, message: bytes, reply: Callable[[bytes], None], *, by_tcp: bool) -> None:
        if len(self._answers) >= MAX_WAITING:
            oldest = next(iter(self._answers))
            del self._answers[oldest]
            self._queue = deque(entry for entry in self._queue if entry[0] != oldest)
        self._last += 1
        self._answers[self._last] = reply
        self._queue.append((self._last, by_tcp, message))
        self._news.set()

    def _on_datagram(self, udp: socket.socket) -> None:
        try:
            message, sender = udp.recvfrom(_MAX_BYTES)
        except OSError:  # nothing there, or an earlier answer had no receiver
            return

        def reply(answer: bytes) -> None:
            if not answer:
                return
            try:
                udp.sendto(answer, sender)
            except OSError as err:
                self._log.debug("name_not_answered", error=str(err))

        self._ask(message, reply, by_tcp=False)

    def _on_connection(self, tcp: socket.socket) -> None:
        try:
            connection, _ = tcp.accept()
        except OSError:
            return
        if len(self._tasks) >= MAX_CONNECTIONS:
            connection.close()
            return
        connection.setblocking(False)
        task = asyncio.get_running_loop().create_task(self._converse(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _converse(self, connection: socket.socket) -> None:
        """One question after the other, each answered before the next is read."""
        loop = asyncio.get_running_loop()
        with connection:
            try:
                while True:
                    async with asyncio.timeout(IDLE_S):
                        length = int.from_bytes(await _exactly(connection, _LENGTH_BYTES), "big")
                        message = await _exactly(connection, length)
                        answered: asyncio.Future[bytes] = loop.create_future()
                        self._ask(message, _setter(answered), by_tcp=True)
                        answer = await answered
                        if not answer:
                            return
                        await loop.sock_sendall(
                            connection, len(answer).to_bytes(_LENGTH_BYTES, "big") + answer
                        )
            except (OSError, EOFError, TimeoutError) as err:
                self._log.debug("name_connection_ended", error=str(err))


def _setter(future: asyncio.Future[bytes]) -> Callable[[bytes], None]:
    def set_once(answer: bytes) -> None:
        if not future.done():
            future.set_result(answer)

    return set_once


async def _exactly(connection: socket.socket, count: int) -> bytes:
    """Raises EOFError when the other side has nothing more to say."""
    data = b""
    while len(data) < count:
        more = await asyncio.get_running_loop().sock_recv(connection, count - len(data))
        if not more:
            raise EOFError("closed by the asker")
        data += more
    return data
