"""The ttrpc descriptions of containerd's services name every method with its types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from google.protobuf.empty_pb2 import Empty

from shim.api import services
from shim.api.gen import sandbox_pb2, task_v3_pb2, ttrpc_events_pb2

if TYPE_CHECKING:
    from types import ModuleType

    from ttrpc import Service

TASK_METHODS = {
    "State": ("StateRequest", "StateResponse"),
    "Create": ("CreateTaskRequest", "CreateTaskResponse"),
    "Start": ("StartRequest", "StartResponse"),
    "Delete": ("DeleteRequest", "DeleteResponse"),
    "Pids": ("PidsRequest", "PidsResponse"),
    "Pause": ("PauseRequest", None),
    "Resume": ("ResumeRequest", None),
    "Checkpoint": ("CheckpointTaskRequest", None),
    "Kill": ("KillRequest", None),
    "Exec": ("ExecProcessRequest", None),
    "ResizePty": ("ResizePtyRequest", None),
    "CloseIO": ("CloseIORequest", None),
    "Update": ("UpdateTaskRequest", None),
    "Wait": ("WaitRequest", "WaitResponse"),
    "Stats": ("StatsRequest", "StatsResponse"),
    "Connect": ("ConnectRequest", "ConnectResponse"),
    "Shutdown": ("ShutdownRequest", None),
}
SANDBOX_METHODS = {
    "CreateSandbox": ("CreateSandboxRequest", "CreateSandboxResponse"),
    "StartSandbox": ("StartSandboxRequest", "StartSandboxResponse"),
    "Platform": ("PlatformRequest", "PlatformResponse"),
    "StopSandbox": ("StopSandboxRequest", "StopSandboxResponse"),
    "WaitSandbox": ("WaitSandboxRequest", "WaitSandboxResponse"),
    "SandboxStatus": ("SandboxStatusRequest", "SandboxStatusResponse"),
    "PingSandbox": ("PingRequest", "PingResponse"),
    "ShutdownSandbox": ("ShutdownSandboxRequest", "ShutdownSandboxResponse"),
    "SandboxMetrics": ("SandboxMetricsRequest", "SandboxMetricsResponse"),
}


@pytest.mark.parametrize(
    ("service", "name", "module", "methods"),
    [
        (services.TASK_V2, "containerd.task.v2.Task", task_v3_pb2, TASK_METHODS),
        (services.TASK_V3, "containerd.task.v3.Task", task_v3_pb2, TASK_METHODS),
        (services.SANDBOX, "containerd.runtime.sandbox.v1.Sandbox", sandbox_pb2, SANDBOX_METHODS),
        (
            services.EVENTS,
            "containerd.services.events.ttrpc.v1.Events",
            ttrpc_events_pb2,
            {"Forward": ("ForwardRequest", None)},
        ),
    ],
    ids=["task v2", "task v3", "sandbox", "events"],
)
def test_service(
    service: Service, name: str, module: ModuleType, methods: dict[str, tuple[str, str | None]]
) -> None:
    assert service.name == name
    assert service.methods.keys() == methods.keys()
    for method_name, (request, response) in methods.items():
        method = service[method_name]
        assert method.name == method_name
        assert method.request is getattr(module, request)
        assert method.response is (Empty if response is None else getattr(module, response))
        assert not (method.client_streaming or method.server_streaming)
