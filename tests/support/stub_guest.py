"""A guest, a sandbox and containerd's ear in one process, without any I/O: for the rules that containers live by.

Nothing happens by itself: processes end when the test says so, and any method of the agent can be held or refused.
"""

from __future__ import annotations

import asyncio
import signal
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.empty_pb2 import Empty

from agent_proto import services
from agent_proto.client import AgentGone
from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import health_pb2, kata_py_agent_pb2, oci_pb2
from shim.api.gen import events_pb2, task_v3_pb2
from shim.container import Container
from shim.errors import NotFound
from shim.guest import Guest, GuestContainer
from shim.io import Stdio
from shim.liveness import Liveness
from shim.status import status_for
from shim.task_service import TaskService
from ttrpc import Call, Code, RpcError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from agent_proto.client import AgentClient
    from shim.events import Publisher
    from shim.io import ProcessIO
    from shim.sandbox import Sandbox

VM_PID = 4242
PROCESS = b'{"args": ["true"], "cwd": "/"}'


class StubAgent:
    """The methods of `AgentClient` that containers use. Init processes run from their creation on."""

    def __init__(self, *, extensions: bool = True) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.stats = pb.StatsContainerResponse()
        self.listed: list[tuple[int, str]] = []
        self.ended: dict[tuple[str, str], asyncio.Future[int]] = {}
        self.gone = asyncio.Event()
        self._features = [services.EXTENSIONS_FEATURE] if extensions else []
        self._held: dict[str, asyncio.Event] = {}
        self._refused: dict[str, RpcError] = {}

    def __getattr__(self, method: str) -> Any:
        """Whatever is not defined here is accepted."""
        if method.startswith("__"):
            raise AttributeError(method)

        async def accepted(request: Message) -> Empty:
            await self._gate(method, request)
            return Empty()

        return accepted

    def hold(self, method: str) -> asyncio.Event:
        """Let the method's calls wait until the event is set."""
        self._held[method] = event = asyncio.Event()
        return event

    def refuse(self, method: str, code: Code = Code.INTERNAL) -> None:
        """Let the method's next call fail."""
        self._refused[method] = RpcError(code, f"{method} is refused")

    def end(self, container_id: str, exec_id: str = "", status: int = 0) -> None:
        """A process ends. Harmless when it has."""
        future = self.ended[container_id, exec_id]
        if not future.done():
            future.set_result(status)

    def called(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)

    async def until_called(self, method: str) -> None:
        while not self.called(method):
            await asyncio.sleep(0)

    async def _gate(self, method: str, request: Message) -> None:
        self.calls.append((method, request))
        if self.gone.is_set():
            raise AgentGone
        if error := self._refused.pop(method, None):
            raise error
        if held := self._held.get(method):
            await self._unless_gone(held.wait())

    async def _unless_gone(self, waiting: Any) -> Any:
        tasks = [asyncio.ensure_future(waiting), asyncio.create_task(self.gone.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise AgentGone
            return tasks[0].result()
        finally:
            tasks[1].cancel()
            tasks[0].cancel()

    async def get_guest_details(self, request: pb.GuestDetailsRequest) -> pb.GuestDetailsResponse:
        await self._gate("get_guest_details", request)
        return pb.GuestDetailsResponse(agent_details=pb.AgentDetails(extra_features=self._features))

    async def check(self, request: health_pb2.CheckRequest) -> health_pb2.HealthCheckResponse:
        await self._gate("check", request)
        return health_pb2.HealthCheckResponse()

    async def exec_process(self, request: pb.ExecProcessRequest) -> Empty:
        await self._gate("exec_process", request)
        self.ended[request.container_id, request.exec_id] = asyncio.get_running_loop().create_future()
        return Empty()

    async def wait_process(self, request: pb.WaitProcessRequest) -> pb.WaitProcessResponse:
        await self._gate("wait_process", request)
        ended = self.ended[request.container_id, request.exec_id]
        return pb.WaitProcessResponse(status=await self._unless_gone(asyncio.shield(ended)))

    async def read_stdout(self, request: pb.ReadStreamRequest) -> pb.ReadStreamResponse:
        """The end of the stream, when the process ends."""
        await self._gate("read_stdout", request)
        await self._unless_gone(asyncio.shield(self.ended[request.container_id, request.exec_id]))
        return pb.ReadStreamResponse()

    async def signal_process(self, request: pb.SignalProcessRequest) -> Empty:
        await self._gate("signal_process", request)
        if request.signal == signal.SIGKILL:
            self._kill(request.container_id, None if not request.exec_id else request.exec_id)
        return Empty()

    async def signal_container(self, request: kata_py_agent_pb2.SignalContainerRequest) -> Empty:
        await self._gate("signal_container", request)
        if request.signal == signal.SIGKILL:
            self._kill(request.container_id, None)
        return Empty()

    async def list_processes(
        self, request: kata_py_agent_pb2.ListProcessesRequest
    ) -> kata_py_agent_pb2.ListProcessesResponse:
        await self._gate("list_processes", request)
        listed = [kata_py_agent_pb2.GuestProcess(pid=pid, exec_id=name) for pid, name in self.listed]
        return kata_py_agent_pb2.ListProcessesResponse(processes=listed)

    async def stats_container(self, request: pb.StatsContainerRequest) -> pb.StatsContainerResponse:
        await self._gate("stats_container", request)
        return self.stats

    def _kill(self, container_id: str, exec_id: str | None) -> None:
        for cid, eid in self.ended:
            if cid == container_id and exec_id in (None, eid):
                self.end(cid, eid, 128 + signal.SIGKILL)


class StubIO:
    """A process's streams: none. `settled` is awaited for what would be under way in them."""

    def __init__(self, settled: asyncio.Event) -> None:
        self._settled = settled

    def open_stdin(self) -> None: ...
    def start(self, guest: object) -> None: ...
    def close_stdin(self) -> None: ...
    def stop_stdin(self) -> None: ...
    def abort(self) -> None: ...
    async def aclose(self, *, drain: bool) -> None: ...

    async def settle(self) -> None:
        await self._settled.wait()


class StubPublisher:
    """Events in the order of their publishing."""

    def __init__(self) -> None:
        self.events: list[Message] = []

    def publish(self, event: Message) -> None:
        self.events.append(event)

    def told(self, container_id: str = "c") -> list[str]:
        """A container's events in short: "start", or "exit e" for those of execs."""
        words = []
        for event in self.events:
            body: Any = event
            if body.container_id == container_id:
                exec_id = getattr(body, "exec_id", "") or getattr(body, "id", "")
                name = event.DESCRIPTOR.name.removeprefix("Task").lower()
                words.append(name if exec_id in ("", container_id) else f"{name} {exec_id}")
        return words


class World:
    """A sandbox that is up, and its Task service. Made inside a running loop."""

    def __init__(self, *, extensions: bool = True) -> None:
        self.agent = StubAgent(extensions=extensions)
        self.publisher = StubPublisher()
        self.containers: dict[str, Container] = {}
        self.outlives_containers = False
        self.shut_downs = 0
        self.output_settled = asyncio.Event()
        self.output_settled.set()
        agent = cast("AgentClient", self.agent)
        self.guest = Guest(agent, VM_PID, Liveness(agent, self.end_machine))
        self.service = TaskService(cast("Sandbox", self), self._shut_down)
        self._handlers = self.service.handlers()

    # What the service needs of a sandbox

    @property
    def needed(self) -> bool:
        return bool(self.containers)

    def container(self, container_id: str) -> Container:
        if container_id not in self.containers:
            raise NotFound(f"no container {container_id}")
        return self.containers[container_id]

    async def delete_container(self, container: Container) -> None:
        await container.delete(remove_in_guest=True)
        self.containers.pop(container.id, None)

    async def resume_container(self, container: Container) -> None:
        await container.resume()

    async def update_container(self, container: Container, resources: oci_pb2.LinuxResources) -> None:
        await container.update(resources)

    async def _shut_down(self) -> None:
        self.shut_downs += 1

    # What tests do

    def create(self, container_id: str = "c", *, terminal: bool = False) -> Container:
        """A container as `Create` leaves it."""
        self.agent.ended[container_id, ""] = asyncio.get_running_loop().create_future()
        container = Container(
            container_id,
            Path("/bundles") / container_id,
            guest=GuestContainer(self.guest, container_id),
            events=cast("Publisher", self.publisher),
            namespace="test",
            stdio=Stdio("", "/out", "/err", terminal),
            io=cast("ProcessIO", StubIO(self.output_settled)),
            undo=ExitStack(),
        )
        self.publisher.publish(events_pb2.TaskCreate(container_id=container_id))
        self.containers[container_id] = container
        return container

    async def end_machine(self) -> None:
        """The machine ends, and with it the connection to its agent."""
        self.agent.gone.set()
        for container in self.containers.values():
            container.guest_died()

    async def call(self, method: str, **fields: Any) -> Any:
        """One call of the service; the container is "c" unless given. Raises RpcError as a client sees it."""
        if method == "Exec":
            fields.setdefault("spec", {"value": PROCESS})
        names = {"Exec": "ExecProcess", "Update": "UpdateTask", "Checkpoint": "CheckpointTask"}
        request = getattr(task_v3_pb2, f"{names.get(method, method)}Request")(**{"id": "c", **fields})
        try:
            return await self._handlers[method](request, Call("task", method, {}, None))
        except Exception as err:
            status = status_for(err)
            raise RpcError(status.code, status.message) from err

    async def code(self, method: str, **fields: Any) -> Code:
        """How a call ends."""
        try:
            await self.call(method, **fields)
        except RpcError as err:
            assert "\n" not in str(err)
            return err.code
        return Code.OK

    async def settle(self) -> None:
        """Let everything happen that does not wait for the outside."""
        for _ in range(16):
            await asyncio.sleep(0)


SPEC = oci_pb2.Process(Args=["true"])
