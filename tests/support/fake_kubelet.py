"""A kubelet's pod-resources socket: a real gRPC server with pods of the test's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import grpc

from shim.api.gen import podresources_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


class Kubelet:
    """What it was asked, in order. Without `has_get` it is one that has only the list."""

    def __init__(self, pods: Sequence[pb.PodResources], *, has_get: bool) -> None:
        self.asked: list[str] = []
        self._pods = pods
        self._has_get = has_get

    def handlers(self) -> grpc.GenericRpcHandler:
        methods: dict[str, tuple[Any, Any]] = {"List": (self._list, pb.ListPodResourcesRequest)}
        if self._has_get:
            methods["Get"] = (self._get, pb.GetPodResourcesRequest)
        return grpc.method_handlers_generic_handler(
            "v1.PodResourcesLister",
            {
                name: grpc.unary_unary_rpc_method_handler(
                    method,
                    request_deserializer=request.FromString,
                    response_serializer=lambda message: message.SerializeToString(),
                )
                for name, (method, request) in methods.items()
            },
        )

    def _list(self, request: Any, context: grpc.ServicerContext) -> pb.ListPodResourcesResponse:
        self.asked.append("List")
        return pb.ListPodResourcesResponse(pod_resources=self._pods)

    def _get(self, request: Any, context: grpc.ServicerContext) -> pb.GetPodResourcesResponse:
        self.asked.append(f"Get {request.pod_namespace}/{request.pod_name}")
        for pod in self._pods:
            if (pod.namespace, pod.name) == (request.pod_namespace, request.pod_name):
                return pb.GetPodResourcesResponse(pod_resources=pod)
        context.abort(grpc.StatusCode.UNKNOWN, "pod is not there")
        raise AssertionError


@contextmanager
def kubelet(socket: Path, pods: Sequence[pb.PodResources], *, has_get: bool = True) -> Iterator[Kubelet]:
    """It serves on the socket for the length of the block."""
    served = Kubelet(pods, has_get=has_get)
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        server.add_generic_rpc_handlers((served.handlers(),))
        server.add_insecure_port(f"unix:{socket}")
        server.start()
        try:
            yield served
        finally:
            server.stop(None).wait()


def pod(
    name: str,
    namespace: str = "default",
    *,
    devices: Mapping[str, Sequence[str]] = MappingProxyType({}),
    claims: Sequence[str] = (),
) -> pb.PodResources:
    """A pod with one container: ids of device plugins by resource, and names of claimed devices."""
    container = pb.ContainerResources(name="web")
    for resource, ids in devices.items():
        container.devices.add(resource_name=resource, device_ids=ids)
    if claims:
        claim = pb.ClaimResource(cdi_devices=[pb.CDIDevice(name=device) for device in claims])
        container.dynamic_resources.add(claim_name="c", claim_resources=[claim])
    return pb.PodResources(name=name, namespace=namespace, containers=[container])
