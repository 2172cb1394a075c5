"""Creates that cannot succeed: what the user reads, and that nothing is left, whichever way it is cleaned up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from shim.api.gen import events_pb2
from tests.support import host
from tests.support.bundles import shell, spec
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim
    from tests.support.fake_qemu import FakeQemu


@pytest.fixture
def bundle(containerd: FakeContainerd, name: str) -> Path:
    return containerd.bundle(name, spec(shell("exec sleep 100")))


async def refusal(shim: Shim) -> RpcError:
    """The error of `Create`, whose text must be one line."""
    with pytest.raises(RpcError) as caught:
        await shim.create()
    assert "\n" not in caught.value.message
    return caught.value


async def clean_up(containerd: FakeContainerd, shim: Shim, how: str) -> None:
    """What containerd may do after a failed Create; the fixtures then look for leftovers."""
    if how == "shutdown":
        await shim.shutdown()
    else:
        assert (await containerd.delete(shim.id, shim.bundle)).exit_status == 128 + signal.SIGKILL
        await host.ended(shim.pid)


both_ways = pytest.mark.parametrize("how", ["shutdown", "delete"])


@both_ways
async def test_configuration(
    containerd: FakeContainerd, name: str, bundle: Path, config: Path, how: str
) -> None:
    config.write_text(
        f'[hypervisor.qemu]\ndefault_vcpus = "two"\nkernel = "/no/kernel"\ninitrd = "{config}"\naccel = "warp"\n'
    )
    shim = await containerd.start(name, bundle)
    error = await refusal(shim)
    assert error.code is Code.INVALID_ARGUMENT
    problems = error.message.split(" | ")
    assert all(problem.startswith(f"{config}: hypervisor.qemu.") for problem in problems)
    assert {problem.split(": ")[1].rpartition(".")[2] for problem in problems} == {
        "default_vcpus",
        "kernel",
        "accel",
    }
    await clean_up(containerd, shim, how)


async def test_no_configuration(containerd: FakeContainerd, name: str, bundle: Path, config: Path) -> None:
    config.unlink()
    error = await refusal(await containerd.start(name, bundle))
    assert (error.code, str(config) in error.message) == (Code.INVALID_ARGUMENT, True)


@both_ways
async def test_no_qemu(containerd: FakeContainerd, name: str, bundle: Path, qemu: FakeQemu, how: str) -> None:
    qemu.path.write_text("#!/no/such/interpreter\n")
    shim = await containerd.start(name, bundle)
    error = await refusal(shim)
    assert (error.code, f"cannot start {qemu.path}" in error.message) == (Code.FAILED_PRECONDITION, True)
    await clean_up(containerd, shim, how)


@both_ways
async def test_qemu_exits(
    containerd: FakeContainerd, name: str, bundle: Path, qemu: FakeQemu, how: str
) -> None:
    qemu.become("exit", "qemu: could not find the moon")
    started_at = time.monotonic()
    shim = await containerd.start(name, bundle)
    error = await refusal(shim)
    assert error.code is Code.UNAVAILABLE
    assert "exit status 1: qemu: could not find the moon" in error.message
    assert time.monotonic() - started_at < 1
    assert (await refusal(shim)).message == error.message  # asked again, it says the same
    await clean_up(containerd, shim, how)


async def test_qemu_dies_in_the_handshake(
    containerd: FakeContainerd, name: str, bundle: Path, qemu: FakeQemu
) -> None:
    qemu.become("signal", str(int(signal.SIGSEGV)))
    error = await refusal(await containerd.start(name, bundle))
    assert (error.code, "killed by SIGSEGV" in error.message) == (Code.UNAVAILABLE, True)


@both_ways
async def test_qemu_does_not_answer(
    containerd: FakeContainerd, name: str, bundle: Path, qemu: FakeQemu, config: Path, how: str
) -> None:
    qemu.become("silent")
    text = config.read_text()
    config.write_text(
        text.replace("[agent", "qmp_read_timeout_ms = 50\nqmp_connect_timeout_ms = 200\n[agent")
    )
    shim = await containerd.start(name, bundle)
    error = await refusal(shim)
    assert (error.code, "no handshake within 0.2 s" in error.message) == (Code.UNAVAILABLE, True)
    await clean_up(containerd, shim, how)


async def test_shutdown_while_qemu_does_not_answer(
    containerd: FakeContainerd, name: str, bundle: Path, qemu: FakeQemu
) -> None:
    qemu.become("silent")
    shim = await containerd.start(name, bundle)
    creating = asyncio.create_task(refusal(shim))
    started_at = time.monotonic()
    await shim.shutdown(now=True)
    assert (await creating).code is Code.UNAVAILABLE
    assert time.monotonic() - started_at < 3  # QMP's own limit is 5 s


@both_ways
@pytest.mark.parametrize("method", ["CreateSandbox", "CreateContainer"])
async def test_agent_refuses(
    containerd: FakeContainerd, agent: FakeAgent, name: str, bundle: Path, method: str, how: str
) -> None:
    agent.fail(method, Code.RESOURCE_EXHAUSTED, "the guest is full")
    shim = await containerd.start(name, bundle)
    error = await refusal(shim)
    assert (error.code, "the guest is full" in error.message) == (Code.RESOURCE_EXHAUSTED, True)
    with pytest.raises(RpcError) as caught:
        await shim.call("State")
    assert caught.value.code is Code.NOT_FOUND
    await clean_up(containerd, shim, how)
    assert containerd.events.items == []


async def test_create_can_be_repeated(
    containerd: FakeContainerd, agent: FakeAgent, name: str, bundle: Path
) -> None:
    agent.fail("CreateContainer", Code.INTERNAL, "not now")
    shim = await containerd.start(name, bundle)
    assert (await refusal(shim)).message == "not now"
    await shim.create()
    await shim.call("Start")


async def test_no_agent(containerd: FakeContainerd, name: str, bundle: Path, config: Path) -> None:
    config.write_text(config.read_text().replace("agent.sock", "nobody.sock"))
    error = await refusal(await containerd.start(name, bundle))
    assert (error.code, "agent" in error.message) == (Code.UNAVAILABLE, True)


async def test_agent_refuses_to_start(
    containerd: FakeContainerd, agent: FakeAgent, name: str, bundle: Path
) -> None:
    agent.fail("StartContainer", Code.INTERNAL, "no such program")
    shim = await containerd.start(name, bundle)
    await shim.create()
    with pytest.raises(RpcError, match="no such program") as caught:
        await shim.call("Start")
    assert caught.value.code is Code.INTERNAL
    await containerd.event(events_pb2.TaskExit)  # a container whose init cannot start has no other future
    assert (await shim.call("State")).status == 3
    await shim.call("Delete")


async def test_exec_that_does_not_start(containerd: FakeContainerd, name: str, bundle: Path) -> None:
    shim = await containerd.start(name, bundle)
    await shim.create()
    await shim.call("Start")
    before = host.open_files(shim.pid)
    await shim.exec("e", {"args": ["/no/such/program"], "cwd": "/"})
    with pytest.raises(RpcError, match="/no/such/program"):
        await shim.call("Start", exec_id="e")
    await shim.call("Delete", exec_id="e")
    assert host.open_files(shim.pid) == before
    topics = [event.topic for event in containerd.events.items]
    assert topics == ["/tasks/create", "/tasks/start", "/tasks/exec-added", "/tasks/delete"]


async def test_connection_broken_in_the_middle_of_create(
    containerd: FakeContainerd, agent: FakeAgent, name: str, bundle: Path
) -> None:
    released = agent.hang("CreateContainer")
    first = await containerd.start(name, bundle)
    creating = asyncio.create_task(first.create())
    await agent.request("CreateContainer")
    await first.client.aclose()
    with pytest.raises(RpcError):
        await creating
    released.set()
    # The container is made all the same: containerd finds it when it is back.
    second = await containerd.connect(name, bundle, first.address)
    await containerd.event(events_pb2.TaskCreate)
    assert (await second.call("State")).status == 1
    await second.call("Start")


async def test_guest_that_takes_too_long_does_not_keep_the_container(
    containerd: FakeContainerd, agent: FakeAgent, config: Path, name: str, bundle: Path
) -> None:
    config.write_text(config.read_text() + "create_container_timeout = 1\n")
    pod = await containerd.start(name, bundle)
    await pod.create()
    released = agent.hang("CreateContainer", nth=2)
    late = containerd.bundle(f"{name}-late", spec(shell("exec sleep 100")))
    with pytest.raises(RpcError) as caught:
        await pod.create(late.name, bundle=late)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    released.set()
    assert (await agent.request("RemoveContainer")).container_id == late.name


@pytest.mark.parametrize("method", ["CreateSandbox", "CreateContainer"])
async def test_vm_dies_while_the_agent_works(
    containerd: FakeContainerd, agent: FakeAgent, name: str, bundle: Path, method: str
) -> None:
    agent.hang(method)
    shim = await containerd.start(name, bundle)
    creating = asyncio.create_task(refusal(shim))
    await agent.request(method)
    killed_at = time.monotonic()
    os.kill(host.helper(shim.pid, "qemu"), signal.SIGKILL)
    await agent.die()
    assert (await creating).code is Code.UNAVAILABLE
    assert time.monotonic() - killed_at < 2
    assert containerd.events.items == []
    await shim.shutdown()


@pytest.mark.parametrize("method", ["CreateSandbox", "CreateContainer"])
async def test_shutdown_while_the_agent_works(
    containerd: FakeContainerd, agent: FakeAgent, name: str, bundle: Path, method: str
) -> None:
    agent.hang(method)
    shim = await containerd.start(name, bundle)
    creating = asyncio.create_task(refusal(shim))
    await agent.request(method)
    started_at = time.monotonic()
    await shim.shutdown(now=True)
    assert (await creating).code is Code.UNAVAILABLE
    assert time.monotonic() - started_at < 3  # containerd waits no longer


async def test_vm_dies_in_a_start(
    containerd: FakeContainerd, agent: FakeAgent, name: str, bundle: Path
) -> None:
    """Whatever the agent still answers: what has ended stays ended, and no start is told after an exit."""
    released = agent.hang("StartContainer")
    shim = await containerd.start(name, bundle)
    vm = (await shim.create()).pid
    starting = asyncio.create_task(shim.call("Start"))
    await agent.request("StartContainer")
    os.kill(vm, signal.SIGKILL)
    await containerd.event(events_pb2.TaskExit)
    released.set()
    await asyncio.gather(starting, return_exceptions=True)
    assert (await shim.call("State")).status == 3
    assert (await shim.call("Delete")).exit_status == 255
    await shim.shutdown()
    topics = [event.topic for event in containerd.events.items]
    assert topics == ["/tasks/create", "/tasks/exit", "/tasks/delete"]
