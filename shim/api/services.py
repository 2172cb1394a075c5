"""containerd's services described for ttrpc: what a shim serves, and the one call it makes.

The served ones are read off the generated descriptors, since nobody calls them by a typed method; the
handlers in the shim's services are registered by name. Forward is called, so it is a typed constant.
"""

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message_factory import GetMessageClass

from shim.api.gen import sandbox_pb2, task_v3_pb2, ttrpc_events_pb2
from ttrpc import Method, Service


def described(service: ServiceDescriptor) -> Service:
    """The ttrpc description of a generated service; all of containerd's are unary."""
    return Service(
        service.full_name,
        tuple(
            Method(method.name, GetMessageClass(method.input_type), GetMessageClass(method.output_type))
            for method in service.methods
        ),
    )


TASK_V3 = described(task_v3_pb2.DESCRIPTOR.services_by_name["Task"])
# The same messages under another package name, which is not on the wire: one set of classes serves both.
TASK_V2 = Service("containerd.task.v2.Task", tuple(TASK_V3.methods.values()))
SANDBOX = described(sandbox_pb2.DESCRIPTOR.services_by_name["Sandbox"])

FORWARD = Method("Forward", ttrpc_events_pb2.ForwardRequest, Empty)
EVENTS = Service("containerd.services.events.ttrpc.v1.Events", (FORWARD,))
