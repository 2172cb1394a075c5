"""A client of containerd's CRI plugin: one typed method for each call that the tests make."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

import grpc

from tests.integration.cri.gen import cri_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from google.protobuf.message import Message

Response = TypeVar("Response", bound="Message")

# A boot without KVM on a busy machine, and what CRI does before and after it.
CALL_TIMEOUT_S = 180.0
READY_TIMEOUT_S = 30.0
RETRY_PAUSE_S = 0.05


class CriError(Exception):
    """A call that CRI refused; `code` is gRPC's."""

    def __init__(self, method: str, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{method}: {code.name}: {details}")
        self.code = code
        self.details = details


class Cri:
    """A connection to the socket of a containerd with CRI. All methods raise CriError."""

    def __init__(self, socket: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix:{socket}")

    def close(self) -> None:
        self._channel.close()

    def _call(
        self,
        request: Message,
        answer: type[Response],
        *,
        service: str = "Runtime",
        timeout_s: float | None = None,
    ) -> Response:
        method = type(request).__name__.removesuffix("Request")
        call = self._channel.unary_unary(
            f"/runtime.v1.{service}Service/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return call(request, timeout=timeout_s or CALL_TIMEOUT_S)
        except grpc.RpcError as err:
            raise CriError(method, err.code(), err.details() or "") from None

    def wait_until_ready(self) -> None:
        """Returns when CRI answers: containerd says that it is ready a moment before its CRI plugin is, and there is
        nothing to wait on."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            try:
                self.version()
            except CriError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_PAUSE_S)
            else:
                return

    def version(self) -> pb.VersionResponse:
        return self._call(pb.VersionRequest(), pb.VersionResponse)

    def status(self) -> pb.StatusResponse:
        return self._call(pb.StatusRequest(verbose=True), pb.StatusResponse)

    def image(self, name: str) -> pb.Image:
        """The image; its id is empty when there is none of that name."""
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=name))
        return self._call(request, pb.ImageStatusResponse, service="Image").image

    # Pods

    def run_pod(self, config: pb.PodSandboxConfig, handler: str) -> str:
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return self._call(request, pb.RunPodSandboxResponse).pod_sandbox_id

    def stop_pod(self, pod: str) -> None:
        self._call(pb.StopPodSandboxRequest(pod_sandbox_id=pod), pb.StopPodSandboxResponse)

    def remove_pod(self, pod: str) -> None:
        self._call(pb.RemovePodSandboxRequest(pod_sandbox_id=pod), pb.RemovePodSandboxResponse)

    def pod_status(self, pod: str) -> pb.PodSandboxStatus:
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod)
        return self._call(request, pb.PodSandboxStatusResponse).status

    def pods(self) -> list[pb.PodSandbox]:
        return list(self._call(pb.ListPodSandboxRequest(), pb.ListPodSandboxResponse).items)

    def pod_stats(self, pod: str) -> pb.PodSandboxStats:
        request = pb.PodSandboxStatsRequest(pod_sandbox_id=pod)
        return self._call(request, pb.PodSandboxStatsResponse).stats

    # Containers

    def create(self, pod: str, config: pb.ContainerConfig, pod_config: pb.PodSandboxConfig) -> str:
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=pod_config)
        return self._call(request, pb.CreateContainerResponse).container_id

    def start(self, container: str) -> None:
        self._call(pb.StartContainerRequest(container_id=container), pb.StartContainerResponse)

    def stop(self, container: str, grace_s: int = 0) -> None:
        self._call(pb.StopContainerRequest(container_id=container, timeout=grace_s), pb.StopContainerResponse)

    def remove(self, container: str) -> None:
        self._call(pb.RemoveContainerRequest(container_id=container), pb.RemoveContainerResponse)

    def container(self, container: str) -> pb.ContainerStatus:
        request = pb.ContainerStatusRequest(container_id=container)
        return self._call(request, pb.ContainerStatusResponse).status

    def containers(self, pod: str = "") -> list[pb.Container]:
        request = pb.ListContainersRequest(filter=pb.ContainerFilter(pod_sandbox_id=pod))
        return list(self._call(request, pb.ListContainersResponse).containers)

    def update(self, container: str, resources: pb.LinuxContainerResources) -> None:
        request = pb.UpdateContainerResourcesRequest(container_id=container, linux=resources)
        self._call(request, pb.UpdateContainerResourcesResponse)

    def reopen_log(self, container: str) -> None:
        self._call(pb.ReopenContainerLogRequest(container_id=container), pb.ReopenContainerLogResponse)

    def stats(self, container: str) -> pb.ContainerStats:
        request = pb.ContainerStatsRequest(container_id=container)
        return self._call(request, pb.ContainerStatsResponse).stats

    def all_stats(self, pod: str) -> list[pb.ContainerStats]:
        request = pb.ListContainerStatsRequest(filter=pb.ContainerStatsFilter(pod_sandbox_id=pod))
        return list(self._call(request, pb.ListContainerStatsResponse).stats)

    # Commands and streams

    def exec(self, container: str, command: Sequence[str], *, timeout_s: int = 0) -> pb.ExecSyncResponse:
        """Runs a command in a container to its end, or for `timeout_s` (whole seconds, 0 is no limit)."""
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=timeout_s)
        return self._call(request, pb.ExecSyncResponse)

    def exec_url(
        self, container: str, command: Sequence[str], *, tty: bool = False, stdin: bool = True
    ) -> str:
        """Where the streams of a command are to be had. A terminal has no stderr of its own."""
        request = pb.ExecRequest(
            container_id=container, cmd=command, tty=tty, stdin=stdin, stdout=True, stderr=not tty
        )
        return self._call(request, pb.ExecResponse).url

    def attach_url(self, container: str, *, tty: bool = False, stdin: bool = True) -> str:
        """Where the streams of the container itself are to be had."""
        request = pb.AttachRequest(container_id=container, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
        return self._call(request, pb.AttachResponse).url

    def port_forward_url(self, pod: str, port: int) -> str:
        """Where a connection to a port of the pod is to be had."""
        request = pb.PortForwardRequest(pod_sandbox_id=pod, port=[port])
        return f"{self._call(request, pb.PortForwardResponse).url}?port={port}"
