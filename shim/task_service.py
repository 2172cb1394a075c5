"""containerd's Task API, versions 2 and 3: decode, call the domain, encode. No decisions are taken here.

The two versions differ only in the name of their protobuf package, which is not on the wire: one set of messages
serves both.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import structlog
from google.protobuf.empty_pb2 import Empty

from shim import VERSION, oci, stats
from shim.api.gen import task_types_pb2
from shim.api.gen import task_v3_pb2 as pb
from shim.creation import CreateRequest
from shim.errors import InvalidRequest, NotFound, NotSupported
from shim.io import Stdio
from shim.status import one_line
from shim.well_known import packed, timestamp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from google.protobuf.any_pb2 import Any as ProtoAny

    from shim.process import Process
    from shim.sandbox import Sandbox
    from ttrpc import Call

T = TypeVar("T")
log = structlog.get_logger()
_JSON = msgspec.json.Decoder(dict[str, Any])


class TaskService:
    """The 17 methods. `on_shutdown` is called when containerd wants this process to end."""

    def __init__(self, sandbox: Sandbox, on_shutdown: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._sandbox = sandbox
        self._on_shutdown = on_shutdown
        self._verbs: set[asyncio.Task[Any]] = set()

    def handlers(self) -> Mapping[str, Callable[[Any, Call], Awaitable[Any]]]:
        """Method name -> handler."""
        return {
            "State": self.state, "Create": self.create, "Start": self.start, "Delete": self.delete,
            "Pids": self.pids, "Pause": self.pause, "Resume": self.resume, "Checkpoint": self.checkpoint,
            "Kill": self.kill, "Exec": self.exec, "ResizePty": self.resize_pty, "CloseIO": self.close_io,
            "Update": self.update, "Wait": self.wait, "Stats": self.stats, "Connect": self.connect,
            "Shutdown": self.shutdown,
        }  # fmt: skip

    async def _to_the_end(self, verb: Coroutine[Any, Any, T]) -> T:
        """Run a verb that changes something to its end, also when the caller's connection breaks meanwhile."""
        task = asyncio.create_task(verb, name=getattr(verb, "__qualname__", ""))
        self._verbs.add(task)
        task.add_done_callback(self._verbs.discard)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            task.add_done_callback(_tell_failure)
            raise
        return task.result()

    async def create(self, req: pb.CreateTaskRequest, call: Call) -> pb.CreateTaskResponse:
        if req.checkpoint:
            raise NotSupported(
                f"cannot restore container {req.id} from a checkpoint: a VM's container has none"
            )
        stdio = Stdio(req.stdin, req.stdout, req.stderr, req.terminal)
        request = CreateRequest(req.id, Path(req.bundle), list(req.rootfs), stdio)
        container = await self._to_the_end(self._sandbox.create_container(request))
        return pb.CreateTaskResponse(pid=container.pid)

    async def start(self, req: pb.StartRequest, call: Call) -> pb.StartResponse:
        process = await self._to_the_end(self._sandbox.container(req.id).start(req.exec_id))
        return pb.StartResponse(pid=process.pid)

    async def exec(self, req: pb.ExecProcessRequest, call: Call) -> Empty:
        container = self._sandbox.container(req.id)
        spec = oci.process_to_proto(_json_of(req.spec, "process"), "process")
        spec.Terminal = req.terminal
        await self._to_the_end(
            container.exec(req.exec_id, spec, Stdio(req.stdin, req.stdout, req.stderr, req.terminal))
        )
        return Empty()

    async def delete(self, req: pb.DeleteRequest, call: Call) -> pb.DeleteResponse:
        container = self._sandbox.container(req.id)
        if req.exec_id and req.exec_id != req.id:
            process = await self._to_the_end(container.delete_exec(req.exec_id))
        else:
            process = container.init
            await self._to_the_end(self._sandbox.delete_container(container))
        status, exited_at = _exit_of(process)
        return pb.DeleteResponse(pid=process.pid, exit_status=status, exited_at=exited_at)

    async def state(self, req: pb.StateRequest, call: Call) -> pb.StateResponse:
        container = self._sandbox.container(req.id)
        process = container.process(req.exec_id)
        status, exited_at = _exit_of(process)
        stdin, stdout, stderr, terminal = process.stdio
        return pb.StateResponse(
            id=req.id,
            exec_id=process.exec_id,
            bundle=str(container.bundle),
            pid=process.pid,
            status=task_types_pb2.Status.ValueType(container.state_of(process).value),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=terminal,
            exit_status=status,
            exited_at=exited_at,
        )

    async def wait(self, req: pb.WaitRequest, call: Call) -> pb.WaitResponse:
        process = self._sandbox.container(req.id).process(req.exec_id)
        await process.wait()
        status, exited_at = _exit_of(process)
        return pb.WaitResponse(exit_status=status, exited_at=exited_at)

    async def kill(self, req: pb.KillRequest, call: Call) -> Empty:
        container = self._sandbox.container(req.id)
        await self._to_the_end(container.kill(req.exec_id, req.signal, to_all=req.all))
        return Empty()

    async def pause(self, req: pb.PauseRequest, call: Call) -> Empty:
        await self._to_the_end(self._sandbox.container(req.id).pause())
        return Empty()

    async def resume(self, req: pb.ResumeRequest, call: Call) -> Empty:
        await self._to_the_end(self._sandbox.resume_container(self._sandbox.container(req.id)))
        return Empty()

    async def resize_pty(self, req: pb.ResizePtyRequest, call: Call) -> Empty:
        await self._sandbox.container(req.id).process(req.exec_id).resize(req.width, req.height)
        return Empty()

    async def close_io(self, req: pb.CloseIORequest, call: Call) -> Empty:
        process = self._sandbox.container(req.id).process(req.exec_id)
        if req.stdin:
            process.close_stdin()
        return Empty()

    async def pids(self, req: pb.PidsRequest, call: Call) -> pb.PidsResponse:
        found = await self._sandbox.container(req.id).pids()
        infos = [task_types_pb2.ProcessInfo(pid=pid, info=_details(exec_id)) for pid, exec_id in found]
        return pb.PidsResponse(processes=infos)

    async def stats(self, req: pb.StatsRequest, call: Call) -> pb.StatsResponse:
        reply = await self._sandbox.container(req.id).stats()
        return pb.StatsResponse(stats=stats.to_any(reply, unified=stats.host_is_unified()))

    async def update(self, req: pb.UpdateTaskRequest, call: Call) -> Empty:
        container = self._sandbox.container(req.id)
        resources = oci.resources_to_proto(_json_of(req.resources, "resources"), "resources")
        await self._to_the_end(self._sandbox.update_container(container, resources))
        return Empty()

    async def checkpoint(self, req: pb.CheckpointTaskRequest, call: Call) -> Empty:
        raise NotSupported(
            "Checkpoint is not supported: a container in a virtual machine cannot be checkpointed"
        )

    async def connect(self, req: pb.ConnectRequest, call: Call) -> pb.ConnectResponse:
        try:
            task_pid = self._sandbox.container(req.id).pid
        except NotFound:
            task_pid = 0  # containerd asks before it creates the task, too
        return pb.ConnectResponse(shim_pid=os.getpid(), task_pid=task_pid, version=VERSION)

    async def shutdown(self, req: pb.ShutdownRequest, call: Call) -> Empty:
        # With containers left this is a success without effect: containerd says it for each container of a pod.
        if req.now or not self._sandbox.needed:
            await self._to_the_end(self._on_shutdown())
        return Empty()


def _tell_failure(verb: asyncio.Task[Any]) -> None:
    """What nobody waits for any more is told in the log instead."""
    if not verb.cancelled() and (err := verb.exception()) is not None:
        log.warning("abandoned_call_failed", verb=verb.get_name(), error=one_line(err))


def _exit_of(process: Process) -> tuple[int, Any]:
    if not process.exited.done():
        return 0, None
    end = process.exited.result()
    return end.status, timestamp(end.at_ns)


def _details(exec_id: str) -> ProtoAny | None:
    if not exec_id:
        return None
    from shim.api.gen.runc_options_pb2 import ProcessDetails

    return packed(ProcessDetails(exec_id=exec_id))


def _json_of(payload: ProtoAny, what: str) -> dict[str, Any]:
    """The JSON object that containerd packs into an Any for Go types.

    Raises:
        InvalidRequest: empty, or not a JSON object.
    """
    try:
        return _JSON.decode(payload.value)
    except msgspec.MsgspecError as err:
        raise InvalidRequest(
            f"{what} of type {payload.type_url or '(none)'} is not a JSON object: {err}"
        ) from err
