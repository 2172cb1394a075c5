"""An agent that answers from memory: what the bench measures the host's side of the shim with.

    python -m bench.stdout_agent SOCKET BYTES

There is one process. Its stdout is BYTES zeros; when they are read it has exited. Ends when its connection does.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING

from agent_proto import services
from agent_proto.gen import agent_pb2
from ttrpc import Server

if TYPE_CHECKING:
    from ttrpc import Call, Handler

# As much as our agent gives in one answer.
_LARGEST_READ = 1 << 20


class Agent:
    """The process: how much of its output is left."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._zeros = bytes(_LARGEST_READ)
        self._read_up = asyncio.Event()

    def server(self) -> Server:
        """A server with the calls that the shim makes."""
        server = Server()
        handlers: dict[str, Handler] = {"ReadStdout": self._read_stdout, "WaitProcess": self._wait_process}
        server.register(services.AGENT, handlers)
        return server

    async def _read_stdout(
        self, request: agent_pb2.ReadStreamRequest, call: Call
    ) -> agent_pb2.ReadStreamResponse:
        size = min(request.len, _LARGEST_READ, self._left)
        self._left -= size
        if not size:
            self._read_up.set()
        return agent_pb2.ReadStreamResponse(data=self._zeros if size == _LARGEST_READ else bytes(size))

    async def _wait_process(
        self, request: agent_pb2.WaitProcessRequest, call: Call
    ) -> agent_pb2.WaitProcessResponse:
        await self._read_up.wait()
        return agent_pb2.WaitProcessResponse(status=0)


async def serve(path: str, size: int) -> None:
    """Serve one connection at a Unix socket, to its end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.setblocking(False)
        print("listening", flush=True)
        connected, _ = await asyncio.get_running_loop().sock_accept(listener)
    # Room for a whole answer (the kernel cuts this down to what it allows): it is not this end that is measured.
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _LARGEST_READ)
    await Agent(size).server().serve_connection(connected)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2])))
