"""containerd's Sandbox API: a sandbox without a pause container, its whole life, and every call at every moment."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf.any_pb2 import Any as ProtoAny

from shim.api.gen import bootstrap_pb2, cgroups_v1_pb2, cgroups_v2_pb2, events_pb2, pod_pb2
from shim.api.services import SANDBOX
from shim.stats import host_is_unified
from tests.support import host
from tests.support.bundles import make_fifos, pod, shell, spec
from tests.support.fake_containerd import NAMESPACE, task_events
from ttrpc import Code, ConnectionClosed, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd
    from tests.support.fake_containerd import Shim as TaskShim
    from tests.support.fake_qemu import FakeQemu

SLEEP = shell("exec sleep 100")
SANDBOX_READY, SANDBOX_NOTREADY = "SANDBOX_READY", "SANDBOX_NOTREADY"
METHODS = (
    "CreateSandbox", "StartSandbox", "Platform", "StopSandbox", "SandboxStatus", "PingSandbox", "SandboxMetrics",
)  # fmt: skip


class Pod:
    """A shim and the sandbox that is managed through its Sandbox API."""

    def __init__(self, containerd: FakeContainerd, task: TaskShim) -> None:
        self.id = task.id
        self.task = task
        self._containerd = containerd

    async def call(self, method: str, **fields: Any) -> Any:
        """One call of the Sandbox service. Raises RpcError."""
        described = SANDBOX[method]
        request = described.request(**{"sandbox_id": self.id, **fields})
        return await self.task.client.call(SANDBOX.name, described, request)

    async def create(self, config: pod_pb2.PodSandboxConfig | None = None, **fields: Any) -> None:
        """`CreateSandbox` as CRI calls it."""
        options = ProtoAny(
            type_url="runtime.v1.PodSandboxConfig",
            value=(config or pod_pb2.PodSandboxConfig(hostname="web")).SerializeToString(),
        )
        await self.call("CreateSandbox", bundle_path=str(self.task.bundle), options=options, **fields)

    async def up(self, config: pod_pb2.PodSandboxConfig | None = None) -> None:
        """`CreateSandbox` and `StartSandbox`."""
        await self.create(config)
        await self.call("StartSandbox")

    async def container(self, name: str, init: dict[str, Any] = SLEEP, **more: Any) -> str:
        """A container of the pod, running; returns its id."""
        container_id = f"{self.id}-{name}"
        bundle = self._containerd.bundle(
            container_id, spec(init, annotations=pod("container", self.id), **more)
        )
        await self.task.create(container_id, bundle=bundle)
        await self.task.call("Start", id=container_id)
        return container_id

    async def state(self) -> str:
        return str((await self.call("SandboxStatus")).state)


def sandbox_bundle(folder: Path, name: str, *, controller: str = "shim") -> Path:
    """A bundle as containerd's sandbox controller makes it: without a spec."""
    bundle = folder / f"io.containerd.sandbox.controller.v1.{controller}" / NAMESPACE / name
    (bundle / "rootfs").mkdir(parents=True)
    os.mkfifo(bundle / "log", 0o600)
    return bundle


@pytest.fixture
async def sandbox(containerd: FakeContainerd, name: str, tmp_path: Path) -> Pod:
    """A shim that waits for CreateSandbox."""
    bundle = sandbox_bundle(tmp_path, name)
    answer = await containerd.run("start", name, bundle)
    params = json.loads(answer.output)
    assert (answer.code, params["version"], params["protocol"]) == (0, 3, "ttrpc")
    return Pod(containerd, await containerd.connect(name, bundle, params["address"], version=3))


async def code_of(call: Awaitable[object]) -> str:
    """The name of the code that a call ends with."""
    try:
        await call
    except RpcError as err:
        assert "\n" not in str(err)
        return err.code.name
    return "OK"


async def test_whole_life(sandbox: Pod, agent: FakeAgent, containerd: FakeContainerd) -> None:
    await sandbox.create()
    started = await sandbox.call("StartSandbox")
    assert host.is_running(started.pid)
    assert started.created_at.seconds > 0
    assert agent.methods() == ["CreateSandbox"]
    containers = [await sandbox.container("one"), await sandbox.container("two")]
    for container_id in containers:
        await sandbox.task.call("Kill", id=container_id, signal=signal.SIGKILL)
        await sandbox.task.call("Wait", id=container_id)
        await sandbox.task.call("Delete", id=container_id)
        await sandbox.task.call("Shutdown", id=container_id)  # as after every task; the sandbox stays
    assert await sandbox.state() == SANDBOX_READY
    assert await sandbox.container("three")
    await sandbox.call("StopSandbox")
    assert not host.is_running(started.pid)
    assert await sandbox.state() == SANDBOX_NOTREADY
    await sandbox.call("ShutdownSandbox")
    await host.ended(sandbox.task.pid)


async def test_guest_of_a_pod(sandbox: Pod, agent: FakeAgent) -> None:
    config = pod_pb2.PodSandboxConfig(
        hostname="web",
        dns_config=pod_pb2.DNSConfig(
            servers=["10.0.0.10", "10.0.0.11"], searches=["a.local", "b.local"], options=["ndots:5"]
        ),
        linux=pod_pb2.LinuxPodSandboxConfig(sysctls={"net.ipv4.ip_forward": "1", "kernel.msgmax": "9"}),
    )
    await sandbox.up(config)
    request = await agent.request("CreateSandbox")
    dns = ["search a.local b.local", "nameserver 10.0.0.10", "nameserver 10.0.0.11", "options ndots:5"]
    assert (request.hostname, list(request.dns), request.sandbox_id) == ("web", dns, sandbox.id)

    namespaces = [{"type": "pid", "path": "/proc/1/ns/pid"}]  # the pod's
    await sandbox.container("app", linux={"namespaces": namespaces, "sysctl": {"kernel.msgmax": "5"}})
    message = await agent.request("CreateContainer")
    # A container's own setting counts for more than the pod's.
    assert dict(message.OCI.Linux.Sysctl) == {"net.ipv4.ip_forward": "1", "kernel.msgmax": "5"}
    assert message.OCI.Annotations["io.katacontainers.pkg.oci.container_type"] == "pod_container"
    assert message.sandbox_pidns
    mounts = {mount.destination: mount for mount in message.OCI.Mounts}
    for file in ("hostname", "hosts", "resolv.conf"):
        mount = mounts[f"/etc/{file}"]
        assert (mount.type, mount.source.endswith(f"-{file}")) == ("bind", True)
        assert list(mount.options) == ["rbind", "rprivate", "rw"]
    etc = host.RUN_ROOT / sandbox.id / "etc"
    assert (etc / "hostname").read_text() == "web\n"
    assert (etc / "resolv.conf").read_text() == "\n".join(dns) + "\n"
    assert "web" in (etc / "hosts").read_text()


async def test_containers_own_etc_files(sandbox: Pod, agent: FakeAgent, tmp_path: Path) -> None:
    await sandbox.up()
    (tmp_path / "own").touch()
    mount = {
        "destination": "/etc/hosts",
        "type": "bind",
        "source": str(tmp_path / "own"),
        "options": ["rbind"],
    }
    await sandbox.container("app", mounts=[mount])
    message = await agent.request("CreateContainer")
    hosts = [mount.source for mount in message.OCI.Mounts if mount.destination == "/etc/hosts"]
    assert [source.endswith("-own") for source in hosts] == [True]


async def test_defaults_are_the_hosts(sandbox: Pod, agent: FakeAgent) -> None:
    await sandbox.up(pod_pb2.PodSandboxConfig())
    request = await agent.request("CreateSandbox")
    assert request.hostname == socket.gethostname()[:64]
    with open("/etc/resolv.conf") as file:
        assert list(request.dns) == file.read().split("\n")


async def test_description_that_cannot_be_read(sandbox: Pod) -> None:
    options = ProtoAny(type_url="runtime.v1.PodSandboxConfig", value=b"\x12\xff")
    assert await code_of(sandbox.call("CreateSandbox", options=options)) == "INVALID_ARGUMENT"
    await sandbox.up()  # nothing has happened


async def test_spec_instead_of_a_pods_configuration(sandbox: Pod, agent: FakeAgent) -> None:
    """What `ctr sandboxes run` does: the client brings an OCI spec."""
    (sandbox.task.bundle / "config.json").write_text(json.dumps({"hostname": "from-spec"}))
    await sandbox.call("CreateSandbox", bundle_path=str(sandbox.task.bundle))
    await sandbox.call("StartSandbox")
    assert (await agent.request("CreateSandbox")).hostname == "from-spec"


async def test_unknown_sandbox(sandbox: Pod) -> None:
    await sandbox.up()
    for method in (*METHODS, "WaitSandbox", "ShutdownSandbox"):
        with pytest.raises(RpcError, match=f"'other'.*{sandbox.id}") as caught:
            await sandbox.call(method, sandbox_id="other")
        assert caught.value.code is Code.NOT_FOUND, method


EVERY_MOMENT = {
    "expected": "OK FAILED_PRECONDITION OK OK OK FAILED_PRECONDITION FAILED_PRECONDITION",
    "created": "ALREADY_EXISTS OK OK OK OK FAILED_PRECONDITION FAILED_PRECONDITION",
    "ready": "ALREADY_EXISTS FAILED_PRECONDITION OK OK OK OK OK",
    "stopped": "FAILED_PRECONDITION FAILED_PRECONDITION OK OK OK UNAVAILABLE UNAVAILABLE",
    "died": "FAILED_PRECONDITION FAILED_PRECONDITION OK OK OK UNAVAILABLE UNAVAILABLE",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("moment", EVERY_MOMENT)
async def test_every_call_at_every_moment(sandbox: Pod, moment: str, method: str) -> None:
    if moment != "expected":
        await sandbox.create()
    if moment not in ("expected", "created"):
        await sandbox.call("StartSandbox")
    if moment == "stopped":
        await sandbox.call("StopSandbox")
    if moment == "died":
        os.kill((await sandbox.call("SandboxStatus")).pid, signal.SIGKILL)
        await sandbox.call("WaitSandbox")
    expected = EVERY_MOMENT[moment].split()[METHODS.index(method)]
    assert await code_of(sandbox.call(method)) == expected


async def test_status(sandbox: Pod) -> None:
    assert await sandbox.state() == SANDBOX_NOTREADY
    await sandbox.create()
    assert await sandbox.state() == SANDBOX_NOTREADY
    started = await sandbox.call("StartSandbox")
    status = await sandbox.call("SandboxStatus")
    assert (status.sandbox_id, status.pid, status.state) == (sandbox.id, started.pid, SANDBOX_READY)
    assert (status.created_at, status.HasField("exited_at"), dict(status.info)) == (
        started.created_at,
        False,
        {},
    )
    container = await sandbox.container("app")
    info = json.loads((await sandbox.call("SandboxStatus", verbose=True)).info["info"])
    assert (info["phase"], info["shim_pid"], info["containers"]) == ("ready", sandbox.task.pid, [container])
    assert info["machine"]["qemu"] == started.pid
    await sandbox.call("StopSandbox")
    status = await sandbox.call("SandboxStatus")
    assert (status.state, status.exited_at.seconds >= status.created_at.seconds) == (SANDBOX_NOTREADY, True)


async def test_platform(sandbox: Pod) -> None:
    platform = (await sandbox.call("Platform")).platform
    assert (platform.os, platform.architecture) == (
        "linux",
        {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
    )


async def test_container_before_the_start(sandbox: Pod, containerd: FakeContainerd) -> None:
    bundle = containerd.bundle(f"{sandbox.id}-app", spec(SLEEP, annotations=pod("container", sandbox.id)))
    create = sandbox.task.create
    assert await code_of(create(f"{sandbox.id}-app", bundle=bundle)) == "FAILED_PRECONDITION"
    await sandbox.up()
    assert await code_of(create(f"{sandbox.id}-app", bundle=bundle)) == "OK"
    await sandbox.call("StopSandbox")
    assert await code_of(create(f"{sandbox.id}-late", bundle=bundle)) == "UNAVAILABLE"


async def test_stop_ends_containers(sandbox: Pod, containerd: FakeContainerd) -> None:
    await sandbox.up()
    containers = [await sandbox.container(name) for name in ("one", "two")]
    waiting = [asyncio.create_task(sandbox.task.call("Wait", id=name)) for name in containers]
    pod_waits = asyncio.create_task(sandbox.call("WaitSandbox"))
    await asyncio.gather(sandbox.call("StopSandbox"), sandbox.call("StopSandbox"))
    assert [(await wait).exit_status for wait in waiting] == [137, 137]
    assert (await pod_waits).exit_status == 0
    for container_id in containers:
        assert (await containerd.event(events_pb2.TaskExit, container_id=container_id)).exit_status == 137
        assert (await sandbox.task.call("Delete", id=container_id)).exit_status == 137
    topics = [
        topic for topic, container in task_events(containerd.events.items) if container == containers[0]
    ]
    await containerd.event(events_pb2.TaskDelete, container_id=containers[1])
    assert topics[:3] == ["/tasks/create", "/tasks/start", "/tasks/exit"]


async def test_stop_with_patience(sandbox: Pod, tmp_path: Path) -> None:
    """Within the time-out containers end as they like."""
    await sandbox.up()
    os.mkfifo(ready := tmp_path / "ready")
    script = f"trap 'exit 3' TERM; echo > {ready}; while :; do sleep 0.01; done"
    polite = await sandbox.container("polite", shell(script))
    await asyncio.to_thread(ready.read_text)
    await sandbox.call("StopSandbox", timeout_secs=10)
    assert (await sandbox.task.call("Wait", id=polite)).exit_status == 3


async def test_stop_of_a_stubborn_container(sandbox: Pod, tmp_path: Path) -> None:
    await sandbox.up()
    fifos = make_fifos(tmp_path / "fifos", "stdout")
    bundle = sandbox._containerd.bundle(
        f"{sandbox.id}-deaf",
        spec(
            shell("trap '' TERM; echo up; while :; do sleep 0.1; done"),
            annotations=pod("container", sandbox.id),
        ),
    )
    with open(os.open(fifos.stdout, os.O_RDONLY | os.O_NONBLOCK), "rb") as out:
        await sandbox.task.create(f"{sandbox.id}-deaf", bundle=bundle, stdout=fifos.stdout)
        os.set_blocking(out.fileno(), True)
        await sandbox.task.call("Start", id=f"{sandbox.id}-deaf")
        assert await asyncio.to_thread(out.readline) == b"up\n", "deaf from here on"
        await sandbox.call("StopSandbox", timeout_secs=1)
    assert (await sandbox.task.call("Wait", id=f"{sandbox.id}-deaf")).exit_status == 137


async def test_stop_with_a_hung_agent(sandbox: Pod, agent: FakeAgent) -> None:
    await sandbox.up()
    container = await sandbox.container("app")
    released = agent.hang("SignalProcess")
    await sandbox.call("StopSandbox")
    assert (await sandbox.task.call("Wait", id=container)).exit_status == 137
    released.set()


async def test_machine_dies(sandbox: Pod, containerd: FakeContainerd) -> None:
    await sandbox.up()
    container = await sandbox.container("app")
    waiting = asyncio.create_task(sandbox.call("WaitSandbox"))
    os.kill((await sandbox.call("SandboxStatus")).pid, signal.SIGKILL)
    end = await waiting
    assert (end.exit_status, end.exited_at.seconds > 0) == (255, True)
    assert await sandbox.state() == SANDBOX_NOTREADY
    assert (await containerd.event(events_pb2.TaskExit, container_id=container)).exit_status == 255
    await sandbox.call("StopSandbox")
    await sandbox.task.call("Delete", id=container)
    await sandbox.call("ShutdownSandbox")
    await host.ended(sandbox.task.pid)


async def test_guest_that_does_not_come_up(sandbox: Pod, qemu: FakeQemu) -> None:
    qemu.become("exit", "no such machine type")
    await sandbox.create()
    with pytest.raises(RpcError, match="no such machine type") as caught:
        await sandbox.call("StartSandbox")
    assert caught.value.code is Code.UNAVAILABLE
    assert await sandbox.state() == SANDBOX_NOTREADY
    assert (await sandbox.call("WaitSandbox")).exit_status == 255
    await sandbox.call("ShutdownSandbox")  # as containerd does after a failed start
    await host.ended(sandbox.task.pid)


async def test_bad_configuration(containerd: FakeContainerd, name: str, tmp_path: Path, config: Path) -> None:
    config.write_text("[hypervisor.qemu]\ndefault_vcpus = 'two'\n")
    bundle = sandbox_bundle(tmp_path, name)
    answer = await containerd.run("start", name, bundle)
    pod_shim = Pod(containerd, await containerd.connect(name, bundle, json.loads(answer.output)["address"]))
    with pytest.raises(RpcError, match="default_vcpus") as caught:
        await pod_shim.create()
    assert caught.value.code is Code.INVALID_ARGUMENT
    await pod_shim.call("ShutdownSandbox")
    await host.ended(pod_shim.task.pid)


async def test_stop_while_starting(sandbox: Pod, agent: FakeAgent) -> None:
    agent.hang("CreateSandbox")
    await sandbox.create()
    starting = asyncio.create_task(sandbox.call("StartSandbox"))
    await agent.request("CreateSandbox")
    assert await sandbox.state() == SANDBOX_NOTREADY
    assert await code_of(sandbox.call("StartSandbox")) == "FAILED_PRECONDITION"
    await sandbox.call("StopSandbox")
    assert await code_of(starting) == "UNAVAILABLE"


async def test_wait_outlives_its_caller(sandbox: Pod, containerd: FakeContainerd) -> None:
    """containerd is restarted while it waits; the next one asks again."""
    await sandbox.up()
    waiting = asyncio.create_task(sandbox.call("WaitSandbox"))
    await sandbox.call("PingSandbox")
    await sandbox.task.client.aclose()
    with pytest.raises(ConnectionClosed):
        await waiting
    again = Pod(containerd, await containerd.connect(sandbox.id, sandbox.task.bundle, sandbox.task.address))
    assert await again.state() == SANDBOX_READY
    await again.call("StopSandbox")
    assert (await again.call("WaitSandbox")).exit_status == 0


async def test_metrics(sandbox: Pod) -> None:
    await sandbox.up()
    metric = (await sandbox.call("SandboxMetrics")).metrics
    assert (metric.id, metric.timestamp.seconds > 0) == (sandbox.id, True)
    kind = cgroups_v2_pb2.Metrics if host_is_unified() else cgroups_v1_pb2.Metrics
    assert metric.data.type_url == kind.DESCRIPTOR.full_name
    data = kind.FromString(metric.data.value)
    memory = data.memory.usage if isinstance(data, cgroups_v2_pb2.Metrics) else data.memory.usage.usage
    # The shim and the fake QEMU are two Python programs.
    assert 8 << 20 < memory < 1 << 30
    assert data.pids.current >= 2


async def test_shutdown_ends_everything(sandbox: Pod) -> None:
    await sandbox.up()
    await sandbox.container("app")
    pid = (await sandbox.call("SandboxStatus")).pid
    await sandbox.call("ShutdownSandbox")
    await host.ended(sandbox.task.pid)
    assert not host.is_running(pid)


async def test_shim_is_killed(sandbox: Pod, containerd: FakeContainerd) -> None:
    """What it leaves is removed by `delete`, which containerd runs for the sandbox; a new one may follow."""
    await sandbox.up()
    await sandbox.container("app")
    os.kill(sandbox.task.pid, signal.SIGKILL)
    await host.ended(sandbox.task.pid)
    assert (await containerd.delete(sandbox.id, sandbox.task.bundle)).exit_status == 137
    assert not (host.RUN_ROOT / sandbox.id).exists()
    answer = await containerd.run("start", sandbox.id, sandbox.task.bundle)
    address = json.loads(answer.output)["address"]
    again = Pod(containerd, await containerd.connect(sandbox.id, sandbox.task.bundle, address, version=3))
    await again.up()


async def test_sandbox_of_the_first_container_answers_too(containerd: FakeContainerd, name: str) -> None:
    """With a pause container the sandbox's life is that container's; the questions are answered all the same."""
    task = await containerd.start(
        name, containerd.bundle(name, spec(SLEEP, annotations=pod("sandbox", name)))
    )
    sandbox = Pod(containerd, task)
    await task.create()
    assert await sandbox.state() == SANDBOX_READY
    assert await code_of(sandbox.create()) == "ALREADY_EXISTS"
    assert await code_of(sandbox.call("PingSandbox")) == "OK"
    await task.call("Start")
    await task.call("Kill", signal=signal.SIGKILL)
    await task.call("Wait")
    await task.call("Delete")
    await sandbox.call("WaitSandbox")
    assert await sandbox.state() == SANDBOX_NOTREADY


async def test_containerd_2_3(containerd: FakeContainerd, name: str, tmp_path: Path) -> None:
    """It says everything in one message, and reads the answer in the same form."""
    bundle = sandbox_bundle(tmp_path, name)
    answer = await containerd.run("start", name, bundle, stdin=containerd.params(name))
    result = bootstrap_pb2.BootstrapResult.FromString(answer.output)
    assert (answer.code, result.version, result.protocol) == (0, 3, "ttrpc")
    sandbox = Pod(containerd, await containerd.connect(name, bundle, result.address, version=3))
    await sandbox.up()
    assert await sandbox.state() == SANDBOX_READY


async def test_controller_of_1_7(containerd: FakeContainerd, name: str, tmp_path: Path) -> None:
    """It has the Sandbox API, and refuses version 3: it gets the plain address and starts each container's shim."""
    bundle = sandbox_bundle(tmp_path, name, controller="local")
    answer = await containerd.run("start", name, bundle)
    address = f"unix://{containerd.socket_of(name)}"
    assert answer == (0, address.encode(), "")
    sandbox = Pod(containerd, await containerd.connect(name, bundle, address))
    await sandbox.up()
    app = containerd.bundle(f"{name}-app", spec(SLEEP, annotations=pod("container", name)))
    assert await containerd.run("start", f"{name}-app", app) == (0, address.encode(), "")
