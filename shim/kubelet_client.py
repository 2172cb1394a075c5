"""A program that asks a kubelet for the devices of one pod, and writes the answer as JSON to a descriptor.

It is a program of its own because gRPC runs threads, and the daemon, which starts QEMU after a plain fork, has to stay
without any. Nothing of the daemon may import it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import grpc

from shim.api.gen import podresources_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message

_SERVICE = "/v1.PodResourcesLister/"
# The kubelet's own limit of an answer.
_ANSWER_BYTES = 16 << 20
# Others say that this kubelet does not offer the method, or has no such pod: the list tells.
_FINAL = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def main() -> None:
    """Arguments: the number of the descriptor, socket, namespace and name of the pod, seconds for a call."""
    fd, socket, namespace, name, limit_s = sys.argv[1:]
    try:
        answer = ask(socket, namespace, name, float(limit_s))
    except grpc.RpcError as err:
        answer = {"error": f"{err.code().name}: {' '.join((err.details() or '').split())}"}
    with os.fdopen(int(fd), "w") as file:
        json.dump(answer, file)


def ask(socket: str, namespace: str, name: str, limit_s: float) -> dict[str, object]:
    """The pod's devices: of plugins by resource and id, and of claims by their names. Raises grpc.RpcError."""
    options = [
        ("grpc.max_receive_message_length", _ANSWER_BYTES),
        # Servers in Go refuse what would be made of the socket's path.
        ("grpc.default_authority", "localhost"),
    ]
    with grpc.insecure_channel(f"unix:{socket}", options) as channel:
        pod = _pod(channel, namespace, name, limit_s)
    containers = pod.containers if pod is not None else ()
    return {
        "plugins": [
            [devices.resource_name, device_id]
            for container in containers
            for devices in container.devices
            for device_id in devices.device_ids
        ],
        "claims": [
            device.name
            for container in containers
            for resource in container.dynamic_resources
            for claim in resource.claim_resources
            for device in claim.cdi_devices
        ],
    }


def _pod(channel: grpc.Channel, namespace: str, name: str, limit_s: float) -> pb.PodResources | None:
    try:
        request = pb.GetPodResourcesRequest(pod_name=name, pod_namespace=namespace)
        got = pb.GetPodResourcesResponse.FromString(_call(channel, "Get", request, limit_s))
    except grpc.RpcError as err:
        if err.code() in _FINAL:
            raise
    else:
        return got.pod_resources
    listed = pb.ListPodResourcesResponse.FromString(
        _call(channel, "List", pb.ListPodResourcesRequest(), limit_s)
    )
    same = (pod for pod in listed.pod_resources if (pod.namespace, pod.name) == (namespace, name))
    return next(same, None)


def _call(channel: grpc.Channel, method: str, request: Message, limit_s: float) -> bytes:
    call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_SERVICE + method)
    return call(request.SerializeToString(), timeout=limit_s)
