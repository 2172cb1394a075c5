"""containerd's Sandbox API: decode, call the domain, encode. No decisions are taken here.

containerd 2 calls it, on the same socket as the Task API, for runtimes with `sandboxer = "shim"`.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shim import sandbox_metrics, stand_in
from shim.api.gen import sandbox_pb2 as pb
from shim.api.gen import types_pb2
from shim.errors import NotFound
from shim.pod import pod_from_request
from shim.pod_sandbox import Phase
from shim.stats import host_is_unified
from shim.well_known import timestamp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping

    from shim.pod_sandbox import PodSandbox
    from ttrpc import Call

# Names of Go, which containerd compares with.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
# CRI's names, which containerd's CRI plugin looks for.
_READY, _NOT_READY = "SANDBOX_READY", "SANDBOX_NOTREADY"


class SandboxService:
    """The 9 methods. `on_shutdown` is called when containerd wants this process to end."""

    def __init__(self, pod: PodSandbox, on_shutdown: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._pod = pod
        self._on_shutdown = on_shutdown

    def handlers(self) -> Mapping[str, Callable[[Any, Call], Awaitable[Any]]]:
        """Method name -> handler."""
        return {
            "CreateSandbox": self.create, "StartSandbox": self.start, "Platform": self.platform,
            "StopSandbox": self.stop, "WaitSandbox": self.wait, "SandboxStatus": self.status,
            "PingSandbox": self.ping, "ShutdownSandbox": self.shutdown, "SandboxMetrics": self.metrics,
        }  # fmt: skip

    def _require(self, sandbox_id: str) -> None:
        if sandbox_id != self._pod.sandbox.id:
            raise NotFound(f"no sandbox {sandbox_id!r}: this is the shim of sandbox {self._pod.sandbox.id}")

    async def create(self, req: pb.CreateSandboxRequest, call: Call) -> pb.CreateSandboxResponse:
        self._require(req.sandbox_id)
        self._pod.create(pod_from_request(req))
        stand_in.put_in_place(Path(req.bundle_path))
        return pb.CreateSandboxResponse()

    async def start(self, req: pb.StartSandboxRequest, call: Call) -> pb.StartSandboxResponse:
        self._require(req.sandbox_id)
        await self._pod.start()
        return pb.StartSandboxResponse(
            pid=self._pod.sandbox.pid, created_at=timestamp(self._pod.created_at_ns)
        )

    async def platform(self, req: pb.PlatformRequest, call: Call) -> pb.PlatformResponse:
        self._require(req.sandbox_id)
        machine = platform.machine()
        architecture = _ARCHITECTURES.get(machine, machine)
        return pb.PlatformResponse(platform=types_pb2.Platform(os="linux", architecture=architecture))

    async def stop(self, req: pb.StopSandboxRequest, call: Call) -> pb.StopSandboxResponse:
        self._require(req.sandbox_id)
        await self._pod.stop(req.timeout_secs)
        return pb.StopSandboxResponse()

    async def wait(self, req: pb.WaitSandboxRequest, call: Call) -> pb.WaitSandboxResponse:
        self._require(req.sandbox_id)
        end = await self._pod.wait()
        return pb.WaitSandboxResponse(exit_status=end.status, exited_at=timestamp(end.at_ns))

    async def status(self, req: pb.SandboxStatusRequest, call: Call) -> pb.SandboxStatusResponse:
        self._require(req.sandbox_id)
        sandbox = self._pod.sandbox
        ended = sandbox.ended
        return pb.SandboxStatusResponse(
            sandbox_id=sandbox.id,
            pid=sandbox.pid,
            state=_READY if self._pod.phase is Phase.READY else _NOT_READY,
            info={"info": json.dumps(self._info())} if req.verbose else {},
            created_at=timestamp(self._pod.created_at_ns),
            exited_at=timestamp(ended.result().at_ns) if ended.done() else None,
        )

    async def ping(self, req: pb.PingRequest, call: Call) -> pb.PingResponse:
        self._require(req.sandbox_id)
        self._pod.require_ready("ping")
        return pb.PingResponse()

    async def metrics(self, req: pb.SandboxMetricsRequest, call: Call) -> pb.SandboxMetricsResponse:
        self._require(req.sandbox_id)
        self._pod.require_ready("measure")
        usage = await asyncio.to_thread(sandbox_metrics.overhead, os.getpid())
        data = sandbox_metrics.to_any(usage, unified=host_is_unified())
        metric = types_pb2.Metric(timestamp=timestamp(time.time_ns()), id=req.sandbox_id, data=data)
        return pb.SandboxMetricsResponse(metrics=metric)

    async def shutdown(self, req: pb.ShutdownSandboxRequest, call: Call) -> pb.ShutdownSandboxResponse:
        self._require(req.sandbox_id)
        await self._on_shutdown()
        return pb.ShutdownSandboxResponse()

    def _info(self) -> dict[str, Any]:
        sandbox = self._pod.sandbox
        return {
            "phase": self._pod.phase.value,
            "shim_pid": os.getpid(),
            "machine": dict(sandbox.processes),
            "containers": [container.id for container in sandbox.containers],
        }
