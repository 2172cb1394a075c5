"""The agent over ttrpc: what the host sees of it."""

from __future__ import annotations

import asyncio
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto import services
from agent_proto.client import AgentClient
from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import health_pb2, kata_py_agent_pb2, oci_pb2
from guest_agent import errors, rpc
from guest_agent.cmdline import Settings
from guest_agent.log import Log
from guest_agent.modules import ModuleMissing
from guest_agent.server import QuietTime, status_for
from guest_agent.service import AgentService
from guest_agent.uevent import Uevents
from tests.unit.guest_agent.fake_engine import FakeEngine, container_request
from ttrpc import Call, Client, Code, RpcError, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from guest_agent.sandbox import Sandbox


@pytest.fixture
def service(sandbox: Sandbox) -> AgentService:
    return AgentService(sandbox, Settings(), Uevents(), Log(console_fd=None))


@pytest.fixture
async def client(service: AgentService) -> AsyncIterator[Client]:
    server = Server(status_for)
    server.register(rpc.agent(), service.handlers())
    server.register(rpc.health(), service.health_handlers())
    server.register(rpc.extensions(), service.extension_handlers())
    ours, theirs = socket.socketpair()
    serving = asyncio.create_task(server.serve_connection(theirs))
    client = Client.from_socket(ours)
    yield client
    await client.aclose()
    await serving


@pytest.fixture
def agent(client: Client) -> AgentClient:
    return AgentClient(client)


def test_the_services_are_those_of_the_protocol() -> None:
    for ours, described in (
        (rpc.agent(), services.AGENT),
        (rpc.health(), services.HEALTH),
        (rpc.extensions(), services.EXTENSIONS),
    ):
        assert ours.name == described.name
        assert {(name, method.request, method.response) for name, method in ours.methods.items()} == {
            (name, method.request, method.response) for name, method in described.methods.items()
        }


async def test_every_other_method_is_unimplemented_by_name(client: Client, service: AgentService) -> None:
    missing = sorted(set(services.AGENT.methods) - set(service.handlers()))
    assert "SetPolicy" in missing
    for name in missing:
        method = services.AGENT[name]
        with pytest.raises(RpcError, match=name) as caught:
            await client.call(services.AGENT.name, method, method.request())
        assert caught.value.code == Code.UNIMPLEMENTED


async def test_health(agent: AgentClient) -> None:
    answer = await agent.check(health_pb2.CheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert (await agent.version(health_pb2.CheckRequest())).grpc_version == "0.0.1"


async def test_a_container_through_the_protocol(agent: AgentClient) -> None:
    await agent.create_container(container_request("c1", "sh", "-c", "cat; exit 4"))
    await agent.start_container(pb.StartContainerRequest(container_id="c1"))
    written = await agent.write_stdin(pb.WriteStreamRequest(container_id="c1", data=b"hello"))
    assert written.len == 5
    await agent.write_stdin(pb.WriteStreamRequest(container_id="c1", data=b""))
    read = pb.ReadStreamRequest(container_id="c1", len=100)
    assert (await agent.read_stdout(read)).data == b"hello"
    assert (await agent.read_stdout(read)).data == b""
    assert (await agent.read_stderr(read)).data == b""
    for _ in range(2):
        assert (await agent.wait_process(pb.WaitProcessRequest(container_id="c1"))).status == 4
    await agent.remove_container(pb.RemoveContainerRequest(container_id="c1", timeout=10))


async def test_processes_carry_the_exec_ids_of_their_execs(
    agent: AgentClient, sandbox: Sandbox, tmp_path: Path
) -> None:
    await agent.create_container(container_request("c1", "sleep", "1000"))
    await agent.start_container(pb.StartContainerRequest(container_id="c1"))
    for exec_id, args in (("long", ["sleep", "1000"]), ("short", ["true"])):
        process = oci_pb2.Process(Args=args, Cwd="/", User=oci_pb2.User())
        await agent.exec_process(pb.ExecProcessRequest(container_id="c1", exec_id=exec_id, process=process))
    await agent.wait_process(pb.WaitProcessRequest(container_id="c1", exec_id="short"))
    container = sandbox.container("c1")
    init, long, short = container.init.pid, container.process("long").pid, container.process("short").pid
    (tmp_path / "cgroup/kata/c1").mkdir()
    procs = tmp_path / "cgroup/kata/c1/cgroup.procs"
    # A pid that belonged to an exec which has ended may be anybody's by now.
    procs.write_text(f"{init}\n{long}\n{short}\n")
    answer = await agent.list_processes(kata_py_agent_pb2.ListProcessesRequest(container_id="c1"))
    assert [(process.pid, process.exec_id) for process in answer.processes] == [
        (init, ""), (long, "long"), (short, ""),
    ]  # fmt: skip

    procs.write_text(f"{init}\n{long}\n")
    await agent.signal_container(kata_py_agent_pb2.SignalContainerRequest(container_id="c1", signal=15))
    for exec_id in ("", "long"):
        answered = await agent.wait_process(pb.WaitProcessRequest(container_id="c1", exec_id=exec_id))
        assert answered.status == 143
    procs.unlink()


async def test_out_of_memory_is_answered_before_the_exit(
    agent: AgentClient, sandbox: Sandbox, tmp_path: Path
) -> None:
    await agent.create_container(container_request("c1", "sleep", "1000"))
    await agent.start_container(pb.StartContainerRequest(container_id="c1"))
    answers: list[str] = []

    async def poll() -> None:
        answers.append((await agent.get_oom_event(pb.GetOOMEventRequest())).container_id)

    async def wait() -> None:
        answers.append(str((await agent.wait_process(pb.WaitProcessRequest(container_id="c1"))).status))

    waiting, polling = asyncio.create_task(wait()), asyncio.create_task(poll())
    await agent.check(health_pb2.CheckRequest())  # both calls have arrived
    (tmp_path / "cgroup/kata/c1").mkdir()
    events = tmp_path / "cgroup/kata/c1/memory.events"
    events.write_text("oom_kill 1\n")
    sandbox.container("c1").init.signal(9)
    await asyncio.gather(waiting, polling)
    assert answers == ["c1", "137"]
    events.unlink()


async def test_the_extensions_are_announced(agent: AgentClient) -> None:
    details = await agent.get_guest_details(pb.GuestDetailsRequest())
    assert services.EXTENSIONS_FEATURE == "kata_py.agent.v1"
    assert services.EXTENSIONS_FEATURE in details.agent_details.extra_features


async def test_long_polls_do_not_hold_up_others(agent: AgentClient) -> None:
    await agent.create_container(container_request("c1", "sh", "-c", "echo x"))
    wait = asyncio.create_task(agent.wait_process(pb.WaitProcessRequest(container_id="c1")))
    read = asyncio.create_task(agent.read_stdout(pb.ReadStreamRequest(container_id="c1", len=9)))
    oom = asyncio.create_task(agent.get_oom_event(pb.GetOOMEventRequest()))
    await agent.check(health_pb2.CheckRequest())
    assert not wait.done()
    assert not read.done()
    await agent.start_container(pb.StartContainerRequest(container_id="c1"))
    assert (await read).data == b"x\n"
    assert (await wait).status == 0
    oom.cancel()


async def test_work_goes_on_when_the_host_goes_away(
    agent: AgentClient, client: Client, engine: FakeEngine, sandbox: Sandbox
) -> None:
    engine.hold = asyncio.Event()
    creating = asyncio.create_task(agent.create_container(container_request("c1", "true")))
    while "create c1" not in engine.calls:
        await asyncio.sleep(0)
    await client.aclose()
    with pytest.raises(RpcError):
        await creating
    engine.hold.set()
    while sandbox.container("c1").state != "created":
        await asyncio.sleep(0)
    await sandbox.remove_container("c1", None)


@pytest.mark.parametrize(
    ("method", "request_", "code", "text"),
    [
        ("wait_process", pb.WaitProcessRequest(container_id="x"), Code.NOT_FOUND, "no container 'x'"),
        ("start_container", pb.StartContainerRequest(container_id="x"), Code.NOT_FOUND, "no container 'x'"),
        (
            "exec_process",
            pb.ExecProcessRequest(container_id="x"),
            Code.INVALID_ARGUMENT,
            "process with arguments",
        ),
        (
            "signal_process",
            pb.SignalProcessRequest(container_id="x", signal=0),
            Code.INVALID_ARGUMENT,
            "0 is no signal",
        ),
        (
            "signal_process",
            pb.SignalProcessRequest(container_id="x", signal=99),
            Code.INVALID_ARGUMENT,
            "no signal",
        ),
        (
            "create_container",
            pb.CreateContainerRequest(container_id="/"),
            Code.INVALID_ARGUMENT,
            "container id",
        ),
        (
            "list_processes",
            kata_py_agent_pb2.ListProcessesRequest(container_id="x"),
            Code.NOT_FOUND,
            "no container 'x'",
        ),
        (
            "signal_container",
            kata_py_agent_pb2.SignalContainerRequest(container_id="x", signal=9),
            Code.NOT_FOUND,
            "no container 'x'",
        ),
        (
            "signal_container",
            kata_py_agent_pb2.SignalContainerRequest(container_id="x", signal=65),
            Code.INVALID_ARGUMENT,
            "65 is no signal",
        ),
        ("copy_file", pb.CopyFileRequest(path="/etc/x"), Code.INVALID_ARGUMENT, "not a path below"),
        ("get_diagnostic_data", pb.GetDiagnosticDataRequest(log_type="x"), Code.UNIMPLEMENTED, "of type 'x'"),
        ("get_volume_stats", pb.VolumeStatsRequest(volume_guest_path="/none"), Code.NOT_FOUND, "/none"),
    ],
)
async def test_refusals(agent: AgentClient, method: str, request_: Any, code: Code, text: str) -> None:
    with pytest.raises(RpcError, match=text) as caught:
        await getattr(agent, method)(request_)
    assert caught.value.code == code
    assert "\n" not in caught.value.message


def with_nul(what: str) -> pb.CreateContainerRequest:
    request = container_request("c1", "true")
    if what == "root":
        request.OCI.Root.Path = "/a\0b"
    elif what == "sysctl":
        request.OCI.Linux.Sysctl["net.a\0b"] = "1"
    else:
        request.storages.add(driver="local", mount_point="/a\\\0b")
    return request


@pytest.mark.parametrize("what", ["root", "sysctl", "storage"])
async def test_texts_with_nul_are_refused(agent: AgentClient, what: str) -> None:
    with pytest.raises(RpcError, match="CreateContainerRequest: a text in it has a NUL character") as caught:
        await agent.create_container(with_nul(what))
    assert caught.value.code == Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("create_sandbox", pb.CreateSandboxRequest(storages=[pb.Storage(driver="local", mount_point="/\0")])),
        ("get_volume_stats", pb.VolumeStatsRequest(volume_guest_path="/\0")),
        (
            "exec_process",
            pb.ExecProcessRequest(container_id="c", process=oci_pb2.Process(Args=["a", "\0"])),
        ),
        (
            "update_container",
            pb.UpdateContainerRequest(
                container_id="c", resources=oci_pb2.LinuxResources(Unified={"memory.\0": "1"})
            ),
        ),
        (
            "update_ephemeral_mounts",
            pb.UpdateEphemeralMountsRequest(storages=[pb.Storage(driver="ephemeral", options=["\0"])]),
        ),
        ("copy_file", pb.CopyFileRequest(path="/run/kata-containers/shared/containers/\0")),
    ],
)
async def test_nul_is_no_internal_error(agent: AgentClient, method: str, request_: Any) -> None:
    with pytest.raises(RpcError) as caught:
        await getattr(agent, method)(request_)
    assert caught.value.code == Code.INVALID_ARGUMENT


async def test_a_backslash_before_zeros_is_no_nul(agent: AgentClient) -> None:
    await agent.create_container(container_request("c1", "echo", "\\000", "\\\\000"))
    await agent.remove_container(pb.RemoveContainerRequest(container_id="c1"))


@pytest.mark.parametrize(
    "linux",
    [
        oci_pb2.Linux(Namespaces=[oci_pb2.LinuxNamespace()]),
        oci_pb2.Linux(Devices=[oci_pb2.LinuxDevice()]),
        oci_pb2.Linux(Resources=oci_pb2.LinuxResources(HugepageLimits=[oci_pb2.LinuxHugepageLimit(Limit=1)])),
    ],
)
async def test_what_has_no_name_is_the_engines_business(agent: AgentClient, linux: oci_pb2.Linux) -> None:
    request = container_request("c1", "true")
    request.OCI.Linux.CopyFrom(linux)
    await agent.create_container(request)
    await agent.remove_container(pb.RemoveContainerRequest(container_id="c1"))


async def test_a_terminal_is_needed_to_be_resized(agent: AgentClient) -> None:
    await agent.create_container(container_request("c1", "true"))
    with pytest.raises(RpcError, match="no terminal") as caught:
        await agent.tty_win_resize(pb.TtyWinResizeRequest(container_id="c1", row=1, column=1))
    assert caught.value.code == Code.FAILED_PRECONDITION
    await agent.remove_container(pb.RemoveContainerRequest(container_id="c1"))


async def test_the_termination_log(agent: AgentClient, tmp_path: Any) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"why\xff")
    request = container_request("c1", "true")
    request.OCI.Annotations["io.kubernetes.container.terminationMessagePath"] = "/end"
    request.OCI.Mounts.add(destination="/end", source=str(path), type="bind")
    await agent.create_container(request)
    wanted = pb.GetDiagnosticDataRequest(log_type="termination_log", container_id="c1")
    assert (await agent.get_diagnostic_data(wanted)).data == "why\ufffd"
    await agent.remove_container(pb.RemoveContainerRequest(container_id="c1"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("x"), Code.INVALID_ARGUMENT),
        (errors.NotFound("x"), Code.NOT_FOUND),
        (errors.AlreadyExists("x"), Code.ALREADY_EXISTS),
        (errors.StateConflict("x"), Code.FAILED_PRECONDITION),
        (errors.NotSupported("x"), Code.UNIMPLEMENTED),
        (errors.EngineFailed("x"), Code.INTERNAL),
        (ModuleMissing("x"), Code.NOT_FOUND),
        (OSError(28, "No space left on device"), Code.INTERNAL),
        (FileNotFoundError(2, "No such file or directory"), Code.NOT_FOUND),
        (ZeroDivisionError("a defect"), Code.OK),
    ],
)
def test_codes(error: Exception, code: Code) -> None:
    assert status_for(error).code == code


# Work for quiet times


async def test_later_work_waits_for_quiet() -> None:
    done: list[int] = []
    quiet = QuietTime([partial(done.append, number) for number in range(3)], Log(console_fd=None), quiet_s=0)
    release = asyncio.Event()

    async def handler(request: object, call: object) -> str:
        await release.wait()
        return "answer"

    quiet.begin()
    busy = asyncio.create_task(quiet.around(Call("s", "CreateContainer"), None, handler))
    await asyncio.sleep(0.02)
    assert done == []
    release.set()
    assert await busy == "answer"
    release.clear()
    waiting = asyncio.create_task(quiet.around(Call("s", "WaitProcess"), None, handler))
    while len(done) < 3:
        await asyncio.sleep(0)
    assert done == [0, 1, 2]
    waiting.cancel()


async def test_later_work_is_done_in_the_end_though_it_is_never_quiet() -> None:
    done: list[int] = []
    quiet = QuietTime(
        [partial(done.append, number) for number in range(3)],
        Log(console_fd=None),
        quiet_s=1000,
        patience_s=0,
    )
    release = asyncio.Event()

    async def handler(request: object, call: object) -> None:
        await release.wait()

    quiet.begin()
    async with asyncio.timeout(60):
        busy = asyncio.create_task(quiet.around(Call("s", "CreateContainer"), None, handler))
        while len(done) < 3:
            await quiet.around(Call("s", "StatsContainer"), None, answer)
        release.set()
        await busy
    assert done == [0, 1, 2]


async def answer(request: object, call: object) -> None:
    await asyncio.sleep(0)


async def test_later_work_that_fails_is_logged() -> None:
    log = Log(console_fd=None)
    done: list[str] = []

    def fail() -> None:
        raise OSError(5, "Input/output error")

    QuietTime([fail, lambda: done.append("next")], log, quiet_s=0).begin()
    while not done:
        await asyncio.sleep(0)
    assert b"later_work_failed" in log.backlog.take(1000)
