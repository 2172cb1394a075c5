"""Docker's name server, 127.0.0.11, for guests: it exists only in the pod's network namespace on the host, where rules
of the packet filter lead to it. What a guest asks at that address comes here by its agent, and is asked there.

A guest may ask anything at any rate: so many questions are under way at once, and each has its time.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING

import structlog

from agent_proto.gen.kata_py_agent_pb2 import AnswerNameRequest, NextNamesRequest
from hypervisor.errors import HostUnsupported
from hypervisor.netns import entered
from shim.pod import dns_of
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from agent_proto.client import AgentClient
    from agent_proto.gen.kata_py_agent_pb2 import NameQuestion
    from shim.background import InBackground
    from shim.bundle import Bundle
    from shim.network import PodNetwork
    from shim.pod import Pod

log = structlog.get_logger()

ADDRESS, PORT = "127.0.0.11", 53
# Docker's asks others in turn, and gives each of them four seconds.
_ANSWER_LIMIT_S = 10.0
_AT_ONCE = 64
# For a guest that answers without having been asked anything.
_PAUSE_S = 1.0
_MAX_BYTES = 65535
_LENGTH_BYTES = 2  # that is why a message has no more (RFC 1035, 4.2.2)


class Names:
    """The name server of one guest, which is served as soon as a container comes that is to ask it."""

    def __init__(self, agent: AgentClient, network: PodNetwork, in_background: InBackground) -> None:
        self._agent = agent
        self._network = network
        self._in_background = in_background
        self._begun = False

    async def serve_for(self, bundle: Bundle, pod: Pod) -> None:
        """Let the container ask, if it or its pod says that it does."""
        netns = self._network.netns
        if self._begun or netns is None:
            return
        if is_asked_for((*dns_of(bundle), *pod.dns)):
            self._begun = True
            if await begin(self._agent):
                self._in_background(serve(self._agent, netns), "serve names")


def is_asked_for(lines: Iterable[str]) -> bool:
    """Whether a resolv.conf(5) names that server."""
    return any(line.split()[:2] == ["nameserver", ADDRESS] for line in lines)


async def begin(agent: AgentClient) -> bool:
    """Let the guest have the address, from now on; returns whether it does."""
    try:
        await agent.next_names(NextNamesRequest(address=ADDRESS, port=PORT))
    except RpcError as err:
        log.warning("names_not_served", address=ADDRESS, reason=str(err))
        return False
    return True


async def serve(agent: AgentClient, netns: Path, *, port: int = PORT) -> None:
    """Answer the guest's questions until cancelled, or until its agent is gone."""
    turns = asyncio.Semaphore(_AT_ONCE)
    async with asyncio.TaskGroup() as tasks:
        try:
            while True:
                reply = await agent.next_names(NextNamesRequest(address=ADDRESS, port=PORT, wait=True))
                if not reply.questions:
                    await asyncio.sleep(_PAUSE_S)
                for question in reply.questions:
                    await turns.acquire()
                    task = tasks.create_task(_answer(agent, netns, port, question))
                    task.add_done_callback(lambda _: turns.release())
        except RpcError as err:
            log.debug("names_ended", reason=str(err))


async def _answer(agent: AgentClient, netns: Path, port: int, question: NameQuestion) -> None:
    answer = b""
    try:
        if len(question.message) > _MAX_BYTES:
            raise EOFError(f"a question of {len(question.message)} bytes, of at most {_MAX_BYTES}")
        async with asyncio.timeout(_ANSWER_LIMIT_S):
            if question.by_tcp:
                answer = await _asked_by_tcp(netns, port, question.message)
            else:
                answer = await _asked_by_udp(netns, port, question.message)
    except (OSError, EOFError, TimeoutError, HostUnsupported) as err:
        log.debug("name_server_silent", by_tcp=question.by_tcp, error=str(err) or "no answer in time")
    try:
        # Without an answer the guest forgets the question.
        await agent.answer_name(AnswerNameRequest(number=question.number, message=answer))
    except RpcError as err:
        log.debug("name_not_answered", error=str(err))


async def _asked_by_udp(netns: Path, port: int, message: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with _socket(netns, socket.SOCK_DGRAM) as sock:
        await loop.sock_connect(sock, (ADDRESS, port))
        await loop.sock_sendall(sock, message)
        return await loop.sock_recv(sock, _MAX_BYTES)


async def _asked_by_tcp(netns: Path, port: int, message: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with _socket(netns, socket.SOCK_STREAM) as sock:
        await loop.sock_connect(sock, (ADDRESS, port))
        await loop.sock_sendall(sock, len(message).to_bytes(_LENGTH_BYTES, "big") + message)
        length = int.from_bytes(await _exactly(sock, _LENGTH_BYTES), "big")
        return await _exactly(sock, length)


def _socket(netns: Path, kind: socket.SocketKind) -> socket.socket:
    with entered(netns):
        sock = socket.socket(socket.AF_INET, kind)
    sock.setblocking(False)
    return sock


async def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = await asyncio.get_running_loop().sock_recv(sock, count - len(data))
        if not more:
            raise EOFError("the server closed the connection")
        data += more
    return data
