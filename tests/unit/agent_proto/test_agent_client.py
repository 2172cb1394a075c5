"""AgentClient against the services' descriptors, and over a socket pair against a ttrpc server."""

from __future__ import annotations

import asyncio
import inspect
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, get_type_hints

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message_factory import GetMessageClass

from agent_proto import client as client_module
from agent_proto import services
from agent_proto.client import AgentClient
from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import csi_pb2, health_pb2, kata_py_agent_pb2, oci_pb2, types_pb2
from ttrpc import Client, Code, ConnectionClosed, RpcError, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from google.protobuf.descriptor import MethodDescriptor
    from google.protobuf.message import Message

    from ttrpc import Call, Method

DESCRIPTORS = {
    method.name: method
    for service in (
        pb.DESCRIPTOR.services_by_name["AgentService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        kata_py_agent_pb2.DESCRIPTOR.services_by_name["Extensions"],
    )
    for method in service.methods
}

# The wire's name -> the client's name and seconds it may take, of a client made with 7 s and 90 s.
CALLS: dict[str, tuple[str, float | None]] = {
    "CreateSandbox": ("create_sandbox", 7),
    "DestroySandbox": ("destroy_sandbox", 7),
    "GetGuestDetails": ("get_guest_details", 7),
    "SetPolicy": ("set_policy", 7),
    "SetGuestDateTime": ("set_guest_date_time", 7),
    "ReseedRandomDev": ("reseed_random_dev", 7),
    "GetOOMEvent": ("get_oom_event", None),
    "GetMetrics": ("get_metrics", 7),
    "GetDiagnosticData": ("get_diagnostic_data", 7),
    "CreateContainer": ("create_container", 90),
    "StartContainer": ("start_container", 7),
    "RemoveContainer": ("remove_container", 7),
    "UpdateContainer": ("update_container", 7),
    "UpdateEphemeralMounts": ("update_ephemeral_mounts", 7),
    "StatsContainer": ("stats_container", 7),
    "PauseContainer": ("pause_container", 7),
    "ResumeContainer": ("resume_container", 7),
    "RemoveStaleVirtiofsShareMounts": ("remove_stale_virtiofs_share_mounts", 7),
    "ExecProcess": ("exec_process", 7),
    "SignalProcess": ("signal_process", 7),
    "WaitProcess": ("wait_process", None),
    "WriteStdin": ("write_stdin", None),
    "ReadStdout": ("read_stdout", None),
    "ReadStderr": ("read_stderr", None),
    "CloseStdin": ("close_stdin", 7),
    "TtyWinResize": ("tty_win_resize", 7),
    "UpdateInterface": ("update_interface", 7),
    "UpdateRoutes": ("update_routes", 7),
    "ListInterfaces": ("list_interfaces", 7),
    "ListRoutes": ("list_routes", 7),
    "AddARPNeighbors": ("add_arp_neighbors", 7),
    "GetIPTables": ("get_iptables", 7),
    "SetIPTables": ("set_iptables", 7),
    "OnlineCPUMem": ("online_cpu_mem", 7),
    "MemHotplugByProbe": ("mem_hotplug_by_probe", 7),
    "AddSwap": ("add_swap", 7),
    "AddSwapPath": ("add_swap_path", 7),
    "MemAgentMemcgSet": ("mem_agent_memcg_set", 7),
    "MemAgentCompactSet": ("mem_agent_compact_set", 7),
    "CopyFile": ("copy_file", 7),
    "GetVolumeStats": ("get_volume_stats", 7),
    "ResizeVolume": ("resize_volume", 7),
    "Check": ("check", None),
    "Version": ("version", 7),
    "ListProcesses": ("list_processes", 7),
    "SignalContainer": ("signal_container", 7),
    "UpdateMirror": ("update_mirror", 7),
    "RemoveMirror": ("remove_mirror", 7),
    "NextNames": ("next_names", None),
    "AnswerName": ("answer_name", 7),
    "ListenSocket": ("listen_socket", 7),
    "AcceptConnection": ("accept_connection", None),
    "CloseSocket": ("close_socket", 7),
    "LimitProcessors": ("limit_processors", 7),
    "ConnectPort": ("connect_port", 7),
    "MirrorNetwork": ("mirror_network", 7),
}


def test_every_call_of_the_services_is_listed() -> None:
    assert CALLS.keys() == DESCRIPTORS.keys()
    public = {
        name for name, _ in inspect.getmembers(AgentClient, inspect.iscoroutinefunction) if name[0] != "_"
    }
    assert public == {name for name, _ in CALLS.values()}


@pytest.mark.parametrize("wire_name", CALLS)
def test_service_tables_repeat_the_descriptors(wire_name: str) -> None:
    descriptor = DESCRIPTORS[wire_name]
    described = (services.AGENT, services.HEALTH, services.EXTENSIONS)
    method = {service.name: service for service in described}[owner(descriptor)][wire_name]
    assert (method.name, method.request, method.response) == (wire_name, *message_types(descriptor))
    assert not (method.client_streaming or method.server_streaming)


@pytest.mark.parametrize("wire_name", CALLS)
def test_method_is_typed_as_the_service(wire_name: str) -> None:
    generated = (csi_pb2, health_pb2, kata_py_agent_pb2, types_pb2)
    modules = {
        "pb": pb,
        "Empty": Empty,
        **{module.__name__.rpartition(".")[2]: module for module in generated},
    }
    method = getattr(AgentClient, CALLS[wire_name][0])
    hints = get_type_hints(method, globalns=vars(client_module) | modules)
    assert (hints["request"], hints["return"]) == message_types(DESCRIPTORS[wire_name])


class Recorder:
    """Stands in for a ttrpc client: keeps what it was asked and answers with an empty reply."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Message, float | None]] = []

    async def call(
        self, service: str, method: Method[Any, Any], request: Message, *, timeout_s: float | None = None
    ) -> Message:
        self.calls.append((service, method.name, request, timeout_s))
        response: Message = method.response()
        return response


@pytest.mark.parametrize("wire_name", CALLS)
async def test_call_goes_out_with_its_timeout(wire_name: str) -> None:
    recorder = Recorder()
    agent = AgentClient(recorder, timeout_s=7, create_container_timeout_s=90)  # type: ignore[arg-type]
    name, timeout_s = CALLS[wire_name]
    request_type, response_type = message_types(DESCRIPTORS[wire_name])
    request = request_type()

    response = await getattr(agent, name)(request)

    assert recorder.calls == [(owner(DESCRIPTORS[wire_name]), wire_name, request, timeout_s)]
    assert recorder.calls[0][2] is request
    assert type(response) is response_type


async def test_default_timeouts() -> None:
    recorder = Recorder()
    agent = AgentClient(recorder)  # type: ignore[arg-type]
    await agent.start_container(pb.StartContainerRequest())
    await agent.create_container(pb.CreateContainerRequest())
    assert [timeout_s for *_, timeout_s in recorder.calls] == [60, 60]


@pytest.mark.parametrize("wire_name", CALLS)
async def test_call_reaches_a_server(wire_name: str) -> None:
    server = Server()
    seen: list[tuple[str, str, type[Message], float | None]] = []
    descriptor = DESCRIPTORS[wire_name]
    request_type, response_type = message_types(descriptor)

    async def handler(request: Message, call: Call) -> Message:
        left_s = None if call.deadline is None else call.deadline - asyncio.get_running_loop().time()
        seen.append((call.service, call.method, type(request), left_s))
        return response_type()

    register(server, {wire_name: handler})
    name, timeout_s = CALLS[wire_name]
    async with connected(server, timeout_s=7, create_container_timeout_s=90) as agent:
        response = await getattr(agent, name)(request_type())

    assert type(response) is response_type
    [(service, method, request_seen, left_s)] = seen
    assert (service, method, request_seen) == (owner(descriptor), wire_name, request_type)
    if timeout_s is None:
        assert left_s is None
    else:
        assert left_s is not None
        assert timeout_s - 5 < left_s <= timeout_s


async def test_content_goes_both_ways() -> None:
    async def interface(request: pb.UpdateInterfaceRequest, _call: Call) -> types_pb2.Interface:
        return types_pb2.Interface(name=request.interface.name, mtu=9000)

    server = Server()
    register(server, {"UpdateInterface": interface})
    async with connected(server) as agent:
        reply = await agent.update_interface(
            pb.UpdateInterfaceRequest(interface=types_pb2.Interface(name="eth0"))
        )
    assert reply == types_pb2.Interface(name="eth0", mtu=9000)


async def test_a_failure_keeps_the_agents_code_and_text() -> None:
    async def refuse(_request: pb.CreateContainerRequest, _call: Call) -> Empty:
        raise RpcError(Code.PERMISSION_DENIED, "policy says no")

    server = Server()
    register(server, {"CreateContainer": refuse})
    async with connected(server) as agent:
        with pytest.raises(RpcError, match="policy says no") as failure:
            await agent.create_container(pb.CreateContainerRequest(OCI=oci_pb2.Spec(Version="1.2")))
    assert failure.value.code == Code.PERMISSION_DENIED


async def test_a_failure_is_one_printable_line_of_bounded_length() -> None:
    async def refuse(_request: pb.StartContainerRequest, _call: Call) -> Empty:
        details = [AnyMessage(type_url="of.the.guest", value=b"x")]
        raise RpcError(Code.INTERNAL, "no\n\nCaused by:\r\n  \x1b[31mred " + "x" * 100_000, details)

    server = Server()
    register(server, {"StartContainer": refuse})
    async with connected(server) as agent:
        with pytest.raises(RpcError) as failure:
            await agent.start_container(pb.StartContainerRequest())
    assert failure.value.message.startswith("no Caused by: ?[31mred xxx")
    assert len(failure.value.message) == 1000
    assert failure.value.details == ()


async def test_a_silent_agent_ends_in_deadline_exceeded() -> None:
    async def never(_request: pb.SetPolicyRequest, _call: Call) -> Empty:
        await asyncio.get_running_loop().create_future()
        raise AssertionError("the future is never set")

    server = Server()
    register(server, {"SetPolicy": never})
    async with connected(server, timeout_s=0.05) as agent:
        with pytest.raises(RpcError) as failure:
            await agent.set_policy(pb.SetPolicyRequest())
    assert failure.value.code == Code.DEADLINE_EXCEEDED
    assert failure.value.message.startswith("the guest's agent has not answered SetPolicy within 0.05 s: ")


async def test_a_lost_agent_ends_a_call_without_timeout() -> None:
    host, guest = socket.socketpair()
    client = Client.from_socket(host)
    waiting = asyncio.ensure_future(
        AgentClient(client).wait_process(pb.WaitProcessRequest(container_id="c1"))
    )
    guest.setblocking(False)
    assert await asyncio.get_running_loop().sock_recv(guest, 4096)  # the request is out
    guest.close()
    with pytest.raises(ConnectionClosed, match="the guest's agent is gone"):
        await waiting
    await client.aclose()


def owner(descriptor: MethodDescriptor) -> str:
    return descriptor.containing_service.full_name


def message_types(descriptor: MethodDescriptor) -> tuple[type[Message], type[Message]]:
    return GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)


def register(server: Server, handlers: dict[str, Any]) -> None:
    for service in (services.AGENT, services.HEALTH, services.EXTENSIONS):
        own = {name: handler for name, handler in handlers.items() if name in service.methods}
        server.register(service, own)


@asynccontextmanager
async def connected(server: Server, **timeouts: float) -> AsyncIterator[AgentClient]:
    """A client and a server on the two ends of a socket pair; both are closed at the end."""
    host, guest = socket.socketpair()
    serving = asyncio.ensure_future(server.serve_connection(guest))
    client = Client.from_socket(host)
    try:
        yield AgentClient(client, **timeouts)
    finally:
        await client.aclose()
        await server.aclose()
        await serving
