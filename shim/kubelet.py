"""Which devices the kubelet has given to a pod, by its pod-resources socket."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from typing import TYPE_CHECKING

import msgspec

from hypervisor.process import spawned
from shim.errors import DevicesUnknown

if TYPE_CHECKING:
    from shim.pod import Pod

# A kubelet that is busy admitting pods takes some tens of milliseconds.
_CALL_LIMIT_S = 5.0
# Two calls, and the start of a program that imports gRPC, on a machine that is starved.
_LIMIT_S = 30.0
_ANSWER_BYTES = 16 << 20
_READ_BYTES = 65536
# The interpreter finds what this process has found, whatever else there is in its own places.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); import shim.kubelet_client as c; c.main()"
)


class PodResources(msgspec.Struct, frozen=True):
    """`plugins` are a resource's name and a device's id each; `claims` names of CDI."""

    plugins: tuple[tuple[str, str], ...] = ()
    claims: tuple[str, ...] = ()
    error: str = ""


async def resources_of(pod: Pod, path: str) -> PodResources:
    """What the kubelet at this socket has given to the pod.

    Raises DevicesUnknown: it does not answer, or the pod has no name that it knows.
    """
    what = f"pod_resource_api_sock: the kubelet at {path}"
    if not pod.name or not pod.namespace:
        raise DevicesUnknown(
            f"{what} cannot be asked: the pod has no name, as those of Kubernetes have; for others leave the key empty"
        )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        arguments = [str(theirs.fileno()), path, pod.namespace, pod.name, str(_CALL_LIMIT_S)]
        argv = [sys.executable, "-IS", "-c", _PROGRAM, json.dumps(sys.path), *arguments]
        async with spawned(argv, fds=[theirs.fileno()]) as program:
            theirs.close()
            try:
                async with asyncio.timeout(_LIMIT_S):
                    text = await _all_of(ours)
                    await program.wait()
            except TimeoutError:
                raise DevicesUnknown(f"{what} did not answer within {_LIMIT_S:g} s") from None
    try:
        answer = msgspec.json.decode(text, type=PodResources)
    except msgspec.MsgspecError as err:
        last = program.output_tail()[-1:] or ["it said nothing"]
        raise DevicesUnknown(f"{what} could not be asked: {last[0]}; grpcio has to be installed") from err
    if answer.error:
        raise DevicesUnknown(
            f"{what} does not tell the devices of pod {pod.namespace}/{pod.name}: {answer.error}; correct the key, or "
            "look whether the kubelet runs"
        )
    return answer


async def _all_of(connection: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    text = bytearray()
    while len(text) < _ANSWER_BYTES and (data := await loop.sock_recv(connection, _READ_BYTES)):
        text += data
    return bytes(text)
