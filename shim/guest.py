"""The guest, its containers and their processes as its agent offers them: what is asked of a container is put into the
agent's words here."""

from __future__ import annotations

from signal import SIGKILL
from typing import TYPE_CHECKING

import structlog

from agent_proto import services
from agent_proto.gen import agent_pb2, kata_py_agent_pb2
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent_proto.client import AgentClient
    from agent_proto.gen.agent_pb2 import StatsContainerResponse
    from agent_proto.gen.oci_pb2 import LinuxResources
    from agent_proto.gen.oci_pb2 import Process as OciProcess
    from shim.liveness import Liveness

log = structlog.get_logger()

# As many processes as Linux has unless it is told otherwise. A guest that claims more is not believed: the answer has
# to fit into one message.
_PROCESSES_LIMIT = 32768


class Guest:
    """A guest that is up: its agent, what the agent can do, and `pid`, the virtual machine's process on this host."""

    def __init__(self, agent: AgentClient, pid: int, liveness: Liveness) -> None:
        self.agent = agent
        self.pid = pid
        self.liveness = liveness
        self._extended: bool | None = None

    async def extended(self) -> bool:
        """Whether the agent has our extensions; asked once, when it first matters.

        Raises:
            RpcError: the agent does not answer.
        """
        if self._extended is None:
            try:
                reply = await self.agent.get_guest_details(agent_pb2.GuestDetailsRequest())
            except RpcError as err:
                if err.code is not Code.UNIMPLEMENTED:
                    raise
                reply = agent_pb2.GuestDetailsResponse()
            self._extended = services.EXTENSIONS_FEATURE in reply.agent_details.extra_features
        return self._extended


class GuestContainer:
    """One container in the guest. Every method raises RpcError when the agent refuses or is gone."""

    def __init__(self, guest: Guest, container_id: str) -> None:
        self._guest = guest
        self._agent = guest.agent
        self._id = container_id

    @property
    def pid(self) -> int:
        """The process on the host that stands for every process of the container: the virtual machine's."""
        return self._guest.pid

    def process(self, exec_id: str = "", spec: OciProcess | None = None) -> GuestProcess:
        """The init, or an exec that is made of its spec when it starts."""
        return GuestProcess(self._agent, self._id, exec_id, spec)

    async def kill(self) -> None:
        """SIGKILL to all processes. A guest whose agent answers nothing any more is ended instead."""
        await self._guest.liveness.kill(self._id, self.process().signal(SIGKILL))

    async def signal_all(self, number: int, exec_ids: Iterable[str]) -> None:
        """Send a signal to all processes; an agent that cannot do that is told of the init and each of `exec_ids`."""
        if await self._guest.extended():
            await self._agent.signal_container(
                kata_py_agent_pb2.SignalContainerRequest(container_id=self._id, signal=number)
            )
            return
        for exec_id in exec_ids:
            try:
                await self.process(exec_id).signal(number)
            except RpcError as err:  # one that has ended meanwhile keeps it from no other
                log.debug("exec_not_signalled", container=self._id, exec=exec_id, error=str(err))
        await self.process().signal(number)

    async def processes(self) -> list[tuple[int, str]] | None:
        """Process ids in the guest, each with the exec id if it is the process of an exec; None when this agent
        cannot tell."""
        if not await self._guest.extended():
            return None
        reply = await self._agent.list_processes(
            kata_py_agent_pb2.ListProcessesRequest(container_id=self._id)
        )
        return [(process.pid, process.exec_id) for process in reply.processes[:_PROCESSES_LIMIT]]

    async def pause(self) -> None:
        """Freeze all processes."""
        await self._agent.pause_container(agent_pb2.PauseContainerRequest(container_id=self._id))

    async def resume(self) -> None:
        """Thaw all processes."""
        await self._agent.resume_container(agent_pb2.ResumeContainerRequest(container_id=self._id))

    async def update(self, resources: LinuxResources) -> None:
        """Change the limits."""
        await self._agent.update_container(
            agent_pb2.UpdateContainerRequest(container_id=self._id, resources=resources)
        )

    async def stats(self) -> StatsContainerResponse:
        """What the container's cgroups count."""
        return await self._agent.stats_container(agent_pb2.StatsContainerRequest(container_id=self._id))

    async def remove(self) -> None:
        """End what is left of it, and forget it."""
        await self._agent.remove_container(agent_pb2.RemoveContainerRequest(container_id=self._id))


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
