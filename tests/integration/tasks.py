"""A client of containerd's task service, for what `ctr` cannot be told: the mounts of a root file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from shim.api.gen.types_pb2 import Mount

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from tests.integration.containerd import Containerd

_SERVICE = "/containerd.services.tasks.v1.Tasks"
# Fields of CreateTaskRequest; all that is asked here of the other requests is in field 1.
_CONTAINER_ID, _ROOTFS, _STDOUT = 1, 3, 5
_CALL_TIMEOUT_S = 120.0


class Tasks:
    """A connection to the socket of a containerd, as a context manager. All methods raise grpc.RpcError."""

    def __init__(self, containerd: Containerd) -> None:
        self._folder = containerd.server.folder
        self._namespace = containerd.namespace
        self._channel = grpc.insecure_channel(f"unix:{containerd.server.socket}")

    def __enter__(self) -> Tasks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    def run(self, container: str, rootfs: Sequence[tuple[str, str, Sequence[str]]]) -> str:
        """Run a container that exists to its end, with these mounts (type, source, options); returns its output."""
        output = self._folder / f"{container}.out"
        mounts = [Mount(type=kind, source=source, options=options) for kind, source, options in rootfs]
        request = b"".join(
            [
                _field(_CONTAINER_ID, container.encode()),
                *(_field(_ROOTFS, mount.SerializeToString()) for mount in mounts),
                _field(_STDOUT, f"file://{output}".encode()),
            ]
        )
        named = _field(_CONTAINER_ID, container.encode())
        try:
            self._call("Create", request)
            try:
                self._call("Start", named)
                self._call("Wait", named)
            finally:
                self._call("Delete", named)
            return output.read_text()
        finally:
            output.unlink(missing_ok=True)

    def _call(self, method: str, request: bytes) -> bytes:
        call = self._channel.unary_unary(
            f"{_SERVICE}/{method}", request_serializer=bytes, response_deserializer=bytes
        )
        answer: bytes = call(
            request, timeout=_CALL_TIMEOUT_S, metadata=(("containerd-namespace", self._namespace),)
        )
        return answer


def _field(number: int, content: bytes) -> bytes:
    """A field with a length, in protobuf's encoding."""
    size, length = len(content), b""
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + content
