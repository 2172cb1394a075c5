"""What is published of one container: which message each thing that happens becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shim.api.gen import events_pb2
from shim.well_known import timestamp

if TYPE_CHECKING:
    from shim.creation import CreateRequest
    from shim.events import Publisher
    from shim.process import Exit, Process


class ContainerEvents:
    """The events of a container; `pid` is the VM's, as containerd is told for every process."""

    def __init__(self, events: Publisher, container_id: str, pid: int) -> None:
        self._publish = events.publish
        self._id = container_id
        self._pid = pid

    def created(self, request: CreateRequest) -> None:
        stdin, stdout, stderr, terminal = request.stdio
        self._publish(
            events_pb2.TaskCreate(
                container_id=self._id,
                bundle=str(request.bundle),
                rootfs=request.rootfs,
                io=events_pb2.TaskIO(stdin=stdin, stdout=stdout, stderr=stderr, terminal=terminal),
                pid=self._pid,
            )
        )

    def exec_added(self, exec_id: str) -> None:
        self._publish(events_pb2.TaskExecAdded(container_id=self._id, exec_id=exec_id))

    def started(self, process: Process) -> None:
        if process.exec_id:
            self._publish(
                events_pb2.TaskExecStarted(container_id=self._id, exec_id=process.exec_id, pid=self._pid)
            )
        else:
            self._publish(events_pb2.TaskStart(container_id=self._id, pid=self._pid))

    def paused(self) -> None:
        self._publish(events_pb2.TaskPaused(container_id=self._id))

    def resumed(self) -> None:
        self._publish(events_pb2.TaskResumed(container_id=self._id))

    def out_of_memory(self) -> None:
        self._publish(events_pb2.TaskOOM(container_id=self._id))

    def exited(self, process: Process, end: Exit) -> None:
        """The id is the exec's, or again the container's."""
        self._publish(
            events_pb2.TaskExit(
                container_id=self._id,
                id=process.exec_id or self._id,
                pid=self._pid,
                exit_status=end.status,
                exited_at=timestamp(end.at_ns),
            )
        )

    def deleted(self, process: Process) -> None:
        """The id is the exec's, or empty; the process has ended."""
        end = process.exited.result()
        self._publish(
            events_pb2.TaskDelete(
                container_id=self._id,
                id=process.exec_id,
                pid=self._pid,
                exit_status=end.status,
                exited_at=timestamp(end.at_ns),
            )
        )
