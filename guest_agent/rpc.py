"""The agent's services for ttrpc, with message classes made at the first call that needs them.

`agent_proto.services` names every class, which makes all hundred of them at start; a sandbox uses some thirty.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.protobuf.message_factory import GetMessageClass

from agent_proto.gen import agent_pb2, health_pb2, kata_py_agent_pb2
from ttrpc import Service

if TYPE_CHECKING:
    from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
    from google.protobuf.message import Message


class _LazyMethod:
    """What ttrpc expects of a Method, out of the protocol's own description."""

    client_streaming = False
    server_streaming = False

    def __init__(self, descriptor: MethodDescriptor) -> None:
        self.name = descriptor.name
        self._descriptor = descriptor

    @property
    def request(self) -> type[Message]:
        return GetMessageClass(self._descriptor.input_type)

    @property
    def response(self) -> type[Message]:
        return GetMessageClass(self._descriptor.output_type)


def _service(descriptor: ServiceDescriptor) -> Service:
    methods: Any = tuple(_LazyMethod(method) for method in descriptor.methods)
    return Service(descriptor.full_name, methods)


def agent() -> Service:
    """`grpc.AgentService`."""
    return _service(agent_pb2.DESCRIPTOR.services_by_name["AgentService"])


def health() -> Service:
    """`grpc.Health`."""
    return _service(health_pb2.DESCRIPTOR.services_by_name["Health"])


def extensions() -> Service:
    """`kata_py.agent.v1.Extensions`."""
    return _service(kata_py_agent_pb2.DESCRIPTOR.services_by_name["Extensions"])
