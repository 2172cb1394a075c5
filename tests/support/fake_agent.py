"""The guest's agent without a guest: its ttrpc services on a Unix socket of this host.

Containers are processes of this host. Every request is recorded, and any method can be made to fail or to hang.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf.empty_pb2 import Empty

from agent_proto import services
from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import health_pb2, kata_py_agent_pb2, types_pb2
from tests.support.guest_process import GuestProcess
from tests.support.journal import Journal
from ttrpc import Call, Code, RpcError, Server

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ttrpc import Handler, Next


class Request(NamedTuple):
    """One call that the agent got."""

    method: str
    message: Any


class Failpoint(NamedTuple):
    """What happens instead of the nth call of a method: an error, or nothing until `released`."""

    error: RpcError | None
    released: asyncio.Event


class FakeAgent:
    """An agent at `path`. An async context manager. Without `extensions` it offers what Kata's own agent does."""

    def __init__(self, path: Path, *, extensions: bool = True) -> None:
        self.path = path
        self._extensions = extensions
        self.requests: Journal[Request] = Journal()
        self.stats = pb.StatsContainerResponse()
        self._failpoints: dict[tuple[str, int], Failpoint] = {}
        self._counts: dict[str, int] = {}
        # By container and exec id; an empty exec id is the init.
        self._processes: dict[tuple[str, str], GuestProcess] = {}
        self._ended: list[GuestProcess] = []
        self._oom: asyncio.Queue[str] = asyncio.Queue()
        self._server = Server(interceptor=self._intercept)
        self._accepting: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> FakeAgent:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(self.path))
        listener.listen()
        self._server.register(services.AGENT, self._agent_handlers())
        self._server.register(services.HEALTH, {"Check": self._check, "Version": self._version})
        if self._extensions:
            self._server.register(services.EXTENSIONS, self._extension_handlers())
        self._accepting = asyncio.create_task(self._accept(listener))
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.die()
        for process in (*self._processes.values(), *self._ended):
            await process.aclose()

    def fail(self, method: str, code: Code, text: str, *, nth: int = 1) -> None:
        """Let the nth call of a method (counted from 1) fail."""
        self._failpoints[method, nth] = Failpoint(RpcError(code, text), asyncio.Event())

    def hang(self, method: str, *, nth: int = 1) -> asyncio.Event:
        """Let the nth call of a method wait until the event is set, and then do its work."""
        failpoint = Failpoint(None, asyncio.Event())
        self._failpoints[method, nth] = failpoint
        return failpoint.released

    async def request(self, method: str, nth: int = 1) -> Any:
        """The nth request of a method (counted from 1), once it has come."""
        items = await self.requests.until(lambda items: sum(r.method == method for r in items) >= nth)
        return [request.message for request in items if request.method == method][nth - 1]

    async def die(self) -> None:
        """Break off all connections without a word, as happens when the machine ends. Harmless when repeated."""
        assert self._accepting is not None
        tasks = (self._accepting, *self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, listener: socket.socket) -> None:
        with listener:
            while True:
                connected, _ = await asyncio.get_running_loop().sock_accept(listener)
                task = asyncio.create_task(self._server.serve_connection(connected))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

    def methods(self) -> list[str]:
        """The names of the methods called so far, in order, without the long polls."""
        polls = ("WaitProcess", "ReadStdout", "ReadStderr", "GetOOMEvent")
        return [request.method for request in self.requests.items if request.method not in polls]

    def out_of_memory(self, container_id: str) -> None:
        """Tell the host that the kernel killed something in a container."""
        self._oom.put_nowait(container_id)

    def process(self, container_id: str, exec_id: str = "") -> GuestProcess:
        """A process. Raises RpcError NOT_FOUND."""
        try:
            return self._processes[container_id, "" if exec_id == container_id else exec_id]
        except KeyError:
            raise RpcError(Code.NOT_FOUND, f"no process {exec_id!r} in container {container_id}") from None

    async def _intercept(self, call: Call, request: Any, following: Next) -> Any:
        self._counts[call.method] = nth = self._counts.get(call.method, 0) + 1
        self.requests.add(Request(call.method, request))
        failpoint = self._failpoints.get((call.method, nth))
        if failpoint is not None:
            if failpoint.error is not None:
                raise failpoint.error
            await failpoint.released.wait()
        return await following(request, call)

    def _agent_handlers(self) -> Mapping[str, Handler]:
        accepted = (
            "CreateSandbox", "DestroySandbox", "SetPolicy", "UpdateContainer", "PauseContainer", "ResumeContainer",
            "AddARPNeighbors", "TtyWinResize", "AddSwap",
        )  # fmt: skip
        return {
            **dict.fromkeys(accepted, self._nothing),
            "CreateContainer": self._create_container, "StartContainer": self._start_container,
            "RemoveContainer": self._remove_container, "ExecProcess": self._exec_process,
            "SignalProcess": self._signal_process, "WaitProcess": self._wait_process,
            "ReadStdout": self._read_stdout, "ReadStderr": self._read_stderr,
            "WriteStdin": self._write_stdin, "CloseStdin": self._close_stdin,
            "StatsContainer": self._stats_container, "GetOOMEvent": self._get_oom_event,
            "GetGuestDetails": self._get_guest_details,
            "UpdateInterface": self._update_interface, "UpdateRoutes": self._update_routes,
        }  # fmt: skip

    def _extension_handlers(self) -> Mapping[str, Handler]:
        return {
            "ListProcesses": self._list_processes, "SignalContainer": self._signal_container,
            "UpdateMirror": self._nothing, "RemoveMirror": self._nothing, "ListenSocket": self._nothing,
            "CloseSocket": self._nothing, "AcceptConnection": self._never,
            "NextNames": self._next_names, "AnswerName": self._nothing,
            "LimitProcessors": self._nothing, "MirrorNetwork": self._nothing,
        }  # fmt: skip

    async def _next_names(
        self, request: kata_py_agent_pb2.NextNamesRequest, call: Call
    ) -> kata_py_agent_pb2.NextNamesResponse:
        if request.wait:
            await asyncio.get_running_loop().create_future()  # nobody asks anything
        return kata_py_agent_pb2.NextNamesResponse()

    async def _never(self, request: Any, call: Call) -> Empty:
        await asyncio.Event().wait()
        raise AssertionError

    async def _nothing(self, request: Any, call: Call) -> Empty:
        return Empty()

    async def _check(self, request: health_pb2.CheckRequest, call: Call) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    async def _version(self, request: health_pb2.CheckRequest, call: Call) -> health_pb2.VersionCheckResponse:
        return health_pb2.VersionCheckResponse(grpc_version="0.0.1", agent_version="fake")

    async def _get_guest_details(
        self, request: pb.GuestDetailsRequest, call: Call
    ) -> pb.GuestDetailsResponse:
        features = [services.EXTENSIONS_FEATURE] if self._extensions else []
        return pb.GuestDetailsResponse(agent_details=pb.AgentDetails(version="fake", extra_features=features))

    async def _update_interface(self, request: pb.UpdateInterfaceRequest, call: Call) -> types_pb2.Interface:
        return request.interface

    async def _update_routes(self, request: pb.UpdateRoutesRequest, call: Call) -> pb.Routes:
        return request.routes

    async def _create_container(self, request: pb.CreateContainerRequest, call: Call) -> Empty:
        if (request.container_id, "") in self._processes:
            raise RpcError(Code.INTERNAL, f"container {request.container_id} exists")
        self._processes[request.container_id, ""] = GuestProcess(request.OCI.Process)
        return Empty()

    async def _start_container(self, request: pb.StartContainerRequest, call: Call) -> Empty:
        _run(self.process(request.container_id))
        return Empty()

    async def _exec_process(self, request: pb.ExecProcessRequest, call: Call) -> Empty:
        process = GuestProcess(request.process)
        _run(process)
        self._processes[request.container_id, request.exec_id] = process
        return Empty()

    async def _remove_container(self, request: pb.RemoveContainerRequest, call: Call) -> Empty:
        self.process(request.container_id)
        for key in [key for key in self._processes if key[0] == request.container_id]:
            process = self._processes.pop(key)
            self._ended.append(process)
            process.signal(signal.SIGKILL, group=True)
        return Empty()

    async def _signal_process(self, request: pb.SignalProcessRequest, call: Call) -> Empty:
        process = self.process(request.container_id, request.exec_id)
        process.signal(request.signal)
        if request.signal == signal.SIGKILL and not request.exec_id:
            for (container_id, _), other in self._processes.items():
                if container_id == request.container_id:
                    other.signal(signal.SIGKILL, group=True)
        return Empty()

    async def _wait_process(self, request: pb.WaitProcessRequest, call: Call) -> pb.WaitProcessResponse:
        process = self.process(request.container_id, request.exec_id)
        return pb.WaitProcessResponse(status=await asyncio.shield(process.exited))

    async def _read_stdout(self, request: pb.ReadStreamRequest, call: Call) -> pb.ReadStreamResponse:
        return await self._read(request, "stdout")

    async def _read_stderr(self, request: pb.ReadStreamRequest, call: Call) -> pb.ReadStreamResponse:
        return await self._read(request, "stderr")

    async def _read(self, request: pb.ReadStreamRequest, stream: str) -> pb.ReadStreamResponse:
        process = self.process(request.container_id, request.exec_id)
        return pb.ReadStreamResponse(data=await process.read(stream, request.len))

    async def _write_stdin(self, request: pb.WriteStreamRequest, call: Call) -> pb.WriteStreamResponse:
        process = self.process(request.container_id, request.exec_id)
        try:
            return pb.WriteStreamResponse(len=await process.write(request.data))
        except BrokenPipeError as err:
            raise RpcError(Code.INTERNAL, str(err)) from err

    async def _close_stdin(self, request: pb.CloseStdinRequest, call: Call) -> Empty:
        self.process(request.container_id, request.exec_id).close_stdin()
        return Empty()

    async def _stats_container(
        self, request: pb.StatsContainerRequest, call: Call
    ) -> pb.StatsContainerResponse:
        self.process(request.container_id)
        return self.stats

    async def _get_oom_event(self, request: pb.GetOOMEventRequest, call: Call) -> pb.OOMEvent:
        return pb.OOMEvent(container_id=await self._oom.get())

    async def _list_processes(
        self, request: kata_py_agent_pb2.ListProcessesRequest, call: Call
    ) -> kata_py_agent_pb2.ListProcessesResponse:
        self.process(request.container_id)
        response = kata_py_agent_pb2.ListProcessesResponse()
        for (container_id, exec_id), process in self._processes.items():
            if container_id == request.container_id:
                for pid in process.members():
                    response.processes.add(pid=pid, exec_id=exec_id if pid == process.pid else "")
        return response

    async def _signal_container(self, request: kata_py_agent_pb2.SignalContainerRequest, call: Call) -> Empty:
        self.process(request.container_id)
        for (container_id, _), process in self._processes.items():
            if container_id == request.container_id:
                process.signal(request.signal, group=True)
        return Empty()


def _run(process: GuestProcess) -> None:
    try:
        process.start()
    except OSError as err:
        raise RpcError(Code.INTERNAL, f"cannot start {process.spec.Args[0]}: {err.strerror}") from err
