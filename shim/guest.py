"""A container's processes as the guest's agent offers them: the only place of the domain that builds agent requests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_proto.gen import agent_pb2
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from agent_proto.gen.oci_pb2 import Process as OciProcess


class GuestProcess:
    """One process in the guest, named as the agent names it: an empty exec id is the container's init."""

    def __init__(
        self, agent: AgentClient, container_id: str, exec_id: str = "", spec: OciProcess | None = None
    ) -> None:
        self._agent = agent
        self._spec = spec
        self._container_id = container_id
        self._exec_id = exec_id

    async def start(self) -> None:
        """Let the init run that `CreateContainer` made, or make and run the exec."""
        if self._spec is None:
            await self._agent.start_container(
                agent_pb2.StartContainerRequest(container_id=self._container_id)
            )
        else:
            await self._agent.exec_process(
                agent_pb2.ExecProcessRequest(
                    container_id=self._container_id, exec_id=self._exec_id, process=self._spec
                )
            )

    async def wait(self) -> int:
        """The exit status, 128 plus the signal's number when one killed it."""
        reply = await self._agent.wait_process(
            agent_pb2.WaitProcessRequest(container_id=self._container_id, exec_id=self._exec_id)
        )
        return reply.status

    async def signal(self, number: int) -> None:
        """Send a signal; SIGKILL for an init reaches every process of the container."""
        await self._agent.signal_process(
            agent_pb2.SignalProcessRequest(
                container_id=self._container_id, exec_id=self._exec_id, signal=number
            )
        )

    async def resize(self, width: int, height: int) -> None:
        """Change the size of the terminal, in characters."""
        await self._agent.tty_win_resize(
            agent_pb2.TtyWinResizeRequest(
                container_id=self._container_id, exec_id=self._exec_id, row=height, column=width
            )
        )

    async def read_stdout(self, size: int) -> bytes:
        """Up to `size` bytes as soon as there are any; empty at the end."""
        return (await self._agent.read_stdout(self._read_request(size))).data

    async def read_stderr(self, size: int) -> bytes:
        """Up to `size` bytes as soon as there are any; empty at the end."""
        return (await self._agent.read_stderr(self._read_request(size))).data

    async def write_stdin(self, data: bytes) -> None:
        """Write all of `data`; waits for the process to read. Raises RpcError when nothing of it is taken."""
        while data:
            reply = await self._agent.write_stdin(
                agent_pb2.WriteStreamRequest(
                    container_id=self._container_id, exec_id=self._exec_id, data=data
                )
            )
            if not reply.len:  # asked again and again it would take nothing again and again
                raise RpcError(Code.INTERNAL, "the agent took none of the input: the process reads no more")
            data = data[reply.len :]

    async def close_stdin(self) -> None:
        """Tell the process that no more input comes."""
        await self._agent.close_stdin(
            agent_pb2.CloseStdinRequest(container_id=self._container_id, exec_id=self._exec_id)
        )

    def _read_request(self, size: int) -> agent_pb2.ReadStreamRequest:
        return agent_pb2.ReadStreamRequest(container_id=self._container_id, exec_id=self._exec_id, len=size)
