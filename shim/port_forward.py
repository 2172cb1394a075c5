"""`kubectl port-forward` to programs in the guest.

containerd connects to the port in the pod's network namespace on the host, where the guest's programs are not. So there
this process takes all connections to the loopback (`shim.steering`), has the guest's agent connect to the same port of
the guest's, and carries the bytes. Who listens in the namespace itself comes first.

A connection is there before anybody knows whether the guest has such a port; if not, it is reset. The guest only ever
answers: it reaches nothing of the host by this.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from agent_proto.gen.kata_py_agent_pb2 import ConnectPortRequest
from agent_proto.relay import SOCKETS_PORT, TOKEN_BYTES, relay
from hypervisor.errors import HostUnsupported
from shim.steering import listener_here, steered
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.vsock.base import Vsock
    from shim.guest import Guest
    from shim.pod import Pod

log = structlog.get_logger()

# More of them wait, all but two in the kernel's queue, until one of these has ended.
CONNECTIONS = 128
_CONNECT_LIMIT_S = 30.0
# When this process has no descriptors left for a connection.
_PAUSE_S = 1.0
_NOT_EXTENDED = "the guest's agent does not connect to ports for the host"


def namespace_of(pod: Pod) -> Path | None:
    """Where somebody may look for the pod's ports: only Kubernetes does, and never in the host's own namespace."""
    if not pod.name or pod.netns is None:
        return None
    with suppress(OSError):
        if os.path.samefile(pod.netns, "/proc/self/ns/net"):
            return None
    return pod.netns


class PortForward:
    """The loopback of one pod's namespace, for one guest."""

    def __init__(self, guest: Guest, vsock: Vsock, netns: Path) -> None:
        self._guest = guest
        self._vsock = vsock
        self._netns = netns
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._of_no_use = asyncio.Event()

    async def serve(self) -> None:
        """Take connections until cancelled, or until the agent says that it cannot do its part."""
        async with asyncio.TaskGroup() as tasks:
            try:
                with steered(self._netns) as listeners:
                    accepting = [tasks.create_task(self._accept(tasks, listener)) for listener in listeners]
                    try:
                        await self._of_no_use.wait()
                    finally:
                        for task in accepting:
                            task.cancel()
                        await asyncio.wait(accepting)
            except (HostUnsupported, OSError) as err:
                log.warning("ports_not_forwarded", reason=getattr(err, "strerror", None) or str(err))

    async def _accept(self, tasks: asyncio.TaskGroup, listener: socket.socket) -> None:
        own_port = listener.getsockname()[1]
        while True:
            try:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as err:
                log.warning("port_connection_not_accepted", reason=err.strerror)
                await asyncio.sleep(_PAUSE_S)
                continue
            try:
                await self._turns.acquire()
            except BaseException:
                client.close()
                raise
            tasks.create_task(self._connection(client, own_port))

    async def _connection(self, client: socket.socket, own_port: int) -> None:
        port = client.getsockname()[1]
        try:
            with client:
                try:
                    async with asyncio.timeout(_CONNECT_LIMIT_S):
                        # Behind the port that we listen at ourselves is nobody else.
                        program = None if port == own_port else await self._here(client.family, port)
                        if program is None:
                            program = await self._in_guest(port)
                    with program:
                        await relay(client, program)
                except (OSError, RpcError) as err:  # a time-out is one too
                    say = log.info if isinstance(err, RpcError) else log.debug
                    say("port_connection_failed", port=port, reason=str(err) or "no answer in time")
                    _reset(client)
        finally:
            self._turns.release()

    async def _here(self, family: int, port: int) -> socket.socket | None:
        try:
            return await listener_here(self._netns, family, port)
        except (OSError, HostUnsupported) as err:
            log.debug("namespace_not_asked", port=port, reason=str(err))
            return None

    async def _in_guest(self, port: int) -> socket.socket:
        """A connection to the guest's port. Raises RpcError when the agent refuses, OSError."""
        token = await self._token(port)
        program = await self._vsock.connect(SOCKETS_PORT)
        try:
            await asyncio.get_running_loop().sock_sendall(program, token)
        except BaseException:
            program.close()
            raise
        return program

    async def _token(self, port: int) -> bytes:
        try:
            if await self._guest.extended():
                token = (await self._guest.agent.connect_port(ConnectPortRequest(port=port))).token
                if len(token) != TOKEN_BYTES:
                    raise RpcError(Code.INTERNAL, "the guest's agent broke the rules")
                return token
        except RpcError as err:
            if err.code is not Code.UNIMPLEMENTED:
                raise
        if not self._of_no_use.is_set():
            log.warning("ports_not_forwarded", reason=_NOT_EXTENDED)
            self._of_no_use.set()
        raise RpcError(Code.UNIMPLEMENTED, _NOT_EXTENDED)


def _reset(client: socket.socket) -> None:
    """Close it so that the other side learns of a failure, and not of an end."""
    with suppress(OSError):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
