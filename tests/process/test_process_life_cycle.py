"""Containers' lives through the real program: replies, states and events, in order."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest

from shim.api.gen import events_pb2
from tests.support.bundles import FifoEnd, make_fifos, process, read_all, shell, spec
from tests.support.fake_containerd import Dialect, task_events
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim

CREATED, RUNNING, STOPPED, PAUSED = 1, 2, 3, 4


@pytest.fixture
async def shim(containerd: FakeContainerd, name: str) -> Shim:
    """A shim whose container would sleep; not created yet."""
    return await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))


@pytest.mark.parametrize("dialect", list(Dialect), ids=lambda dialect: dialect.name)
async def test_life(containerd: FakeContainerd, agent: FakeAgent, name: str, dialect: Dialect) -> None:
    bundle = containerd.bundle(name, spec(shell("echo hello; exit 7")))
    stdio = make_fifos(bundle / "io", "stdout")
    shim = await containerd.start(
        name, bundle, dialect=dialect, version=3 if dialect is Dialect.PARAMS else 2
    )
    pid = (await shim.create(**stdio._asdict())).pid
    state = await shim.call("State")
    assert (state.id, state.bundle, state.pid, state.status) == (name, str(bundle), pid, CREATED)
    assert (state.stdin, state.stdout, state.stderr, state.terminal) == ("", stdio.stdout, "", False)
    assert (await shim.call("Start")).pid == pid
    waited = await shim.call("Wait")
    assert waited.exit_status == 7
    assert await read_all(stdio.stdout) == b"hello\n"
    state = await shim.call("State")
    assert (state.status, state.exit_status, state.exited_at) == (STOPPED, 7, waited.exited_at)
    deleted = await shim.call("Delete")
    assert (deleted.exit_status, deleted.pid, deleted.exited_at) == (7, pid, waited.exited_at)
    await shim.shutdown()
    topics = [("/tasks/create", name), ("/tasks/start", name), ("/tasks/exit", name), ("/tasks/delete", name)]
    assert task_events(containerd.events.items) == topics
    create, start, end, delete = [event.body for event in containerd.events.items]
    assert {event.namespace for event in containerd.events.items} == {"fake"}
    assert (create.bundle, create.io.stdout, create.pid, start.pid) == (str(bundle), stdio.stdout, pid, pid)
    assert (end.container_id, end.pid, end.exit_status, end.exited_at) == (name, pid, 7, waited.exited_at)
    assert (delete.pid, delete.exit_status, delete.exited_at) == (pid, 7, waited.exited_at)
    assert agent.methods() == ["CreateSandbox", "CreateContainer", "StartContainer"]


async def test_exec_exits_come_before_the_init_exit(containerd: FakeContainerd, shim: Shim) -> None:
    await shim.create()
    await shim.call("Start")
    for exec_id in ("one", "two"):
        await shim.exec(exec_id, shell("exec sleep 100"))
        await shim.call("Start", exec_id=exec_id)
    await shim.call("Kill", signal=int(signal.SIGKILL), all=True)
    assert (await shim.call("Wait")).exit_status == 128 + signal.SIGKILL
    events = task_events(await containerd.events.until(lambda items: len(items) >= 9))
    assert events[:6] == [
        ("/tasks/create", shim.id), ("/tasks/start", shim.id),
        ("/tasks/exec-added", "one"), ("/tasks/exec-started", "one"),
        ("/tasks/exec-added", "two"), ("/tasks/exec-started", "two"),
    ]  # fmt: skip
    assert sorted(events[6:8]) == [("/tasks/exit", "one"), ("/tasks/exit", "two")]
    assert events[8:] == [("/tasks/exit", shim.id)]


async def test_exec(containerd: FakeContainerd, agent: FakeAgent, shim: Shim) -> None:
    pid = (await shim.create()).pid
    await shim.call("Start")
    stdio = make_fifos(shim.bundle / "exec", "stdout", "stderr")
    script = shell('echo "$WORD in $(pwd)"; echo oops >&2; exit 300')
    await shim.exec("e", script | {"env": ["WORD=here"], "cwd": "/tmp"}, **stdio._asdict())
    assert (await shim.call("State", exec_id="e")).status == CREATED
    assert (await shim.call("Start", exec_id="e")).pid == pid
    assert (await shim.call("Wait", exec_id="e")).exit_status == 300 & 0xFF
    assert (await read_all(stdio.stdout), await read_all(stdio.stderr)) == (b"here in /tmp\n", b"oops\n")
    end = await containerd.event(events_pb2.TaskExit)
    assert (end.container_id, end.id, end.pid, end.exit_status) == (shim.id, "e", pid, 300 & 0xFF)
    deleted = await shim.call("Delete", exec_id="e")
    assert (deleted.exit_status, deleted.pid) == (300 & 0xFF, pid)
    gone = await containerd.event(events_pb2.TaskDelete)
    assert (gone.container_id, gone.id, gone.pid, gone.exit_status) == (shim.id, "e", pid, 300 & 0xFF)
    assert gone.exited_at == end.exited_at == deleted.exited_at
    assert (await shim.call("State")).status == RUNNING
    # The same id may be used again.
    await shim.exec("e", shell("exit 0"))
    await shim.call("Delete", exec_id="e")


@pytest.mark.parametrize("status", [0, 1, 126, 255])
async def test_exit_status(containerd: FakeContainerd, name: str, status: int) -> None:
    shim = await containerd.start(name, containerd.bundle(name, spec(shell(f"exit {status}"))))
    await shim.create()
    await shim.call("Start")
    assert (await shim.call("Wait", exec_id=name)).exit_status == status


async def test_killed_by_a_signal(shim: Shim) -> None:
    await shim.create()
    await shim.call("Start")
    await shim.call("Kill", signal=int(signal.SIGTERM))
    assert (await shim.call("Wait")).exit_status == 128 + signal.SIGTERM


async def test_killed_before_its_start(containerd: FakeContainerd, shim: Shim) -> None:
    await shim.create()
    await shim.call("Kill", signal=int(signal.SIGKILL))
    assert (await shim.call("Wait")).exit_status == 128 + signal.SIGKILL
    await shim.call("Delete")
    await shim.shutdown()
    topics = [topic for topic, _ in task_events(containerd.events.items)]
    assert topics == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


async def test_deleted_before_its_start(containerd: FakeContainerd, shim: Shim) -> None:
    await shim.create()
    assert (await shim.call("Delete")).exit_status == 128 + signal.SIGKILL
    await shim.shutdown()
    topics = [topic for topic, _ in task_events(containerd.events.items)]
    assert topics == ["/tasks/create", "/tasks/exit", "/tasks/delete"]


async def test_two_containers_of_a_pod(containerd: FakeContainerd, agent: FakeAgent, shim: Shim) -> None:
    joining = containerd.bundle(f"{shim.id}-app", spec(shell("exit 3")))
    app = joining.name
    await shim.create()
    await shim.call("Start")
    await shim.create(app, bundle=joining)
    await shim.call("Start", id=app)
    assert (await shim.call("Wait", id=app)).exit_status == 3
    await shim.call("Delete", id=app)
    await shim.call("Shutdown", id=app)  # said for each container; the sandbox lives on
    assert (await agent.request("RemoveContainer")).container_id == app
    assert (await shim.call("State")).status == RUNNING


async def test_pause_and_resume(containerd: FakeContainerd, agent: FakeAgent, shim: Shim) -> None:
    await shim.create()
    await shim.call("Start")
    await shim.exec("e", shell("exec sleep 100"))
    await shim.call("Start", exec_id="e")
    await shim.call("Pause")
    assert (await shim.call("State")).status == PAUSED
    assert (await shim.call("State", exec_id="e")).status == PAUSED
    await shim.call("Resume")
    assert (await shim.call("State", exec_id="e")).status == RUNNING
    assert agent.methods()[-2:] == ["PauseContainer", "ResumeContainer"]
    assert (await containerd.event(events_pb2.TaskPaused)).container_id == shim.id
    assert (await containerd.event(events_pb2.TaskResumed)).container_id == shim.id


@pytest.mark.parametrize("verb", ["Pause", "Resume"])
async def test_end_while_pausing_or_resuming(
    containerd: FakeContainerd, agent: FakeAgent, shim: Shim, verb: str
) -> None:
    """The end is the last state, whatever the agent answers to what was asked before."""
    await shim.create()
    await shim.call("Start")
    if verb == "Resume":
        await shim.call("Pause")
    released = agent.hang(f"{verb}Container")
    changing = asyncio.create_task(shim.call(verb))
    await agent.request(f"{verb}Container")
    await shim.call("Kill", signal=int(signal.SIGKILL))
    await shim.call("Wait")
    released.set()
    with pytest.raises(RpcError, match="it is stopped") as caught:
        await changing
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert (await shim.call("State")).status == STOPPED
    await shim.call("Delete")


async def test_kill_of_an_exec_with_all(shim: Shim) -> None:
    """`all` is meant for the container's own process; as in runc's shim, an exec has no "all"."""
    await shim.create()
    await shim.call("Start")
    await shim.exec("e", shell("exec sleep 100"))
    await shim.call("Start", exec_id="e")
    await shim.call("Kill", exec_id="e", signal=int(signal.SIGKILL), all=True)
    assert (await shim.call("Wait", exec_id="e")).exit_status == 128 + signal.SIGKILL
    assert (await shim.call("State")).status == RUNNING


async def test_exec_that_would_outlive_its_container(containerd: FakeContainerd, shim: Shim) -> None:
    """As with a PID namespace that is not the container's own: it is killed, and told to have ended before."""
    await shim.create()
    await shim.call("Start")
    await shim.exec("e", shell("exec sleep 100"))
    await shim.call("Start", exec_id="e")
    waiting = asyncio.create_task(shim.call("Wait", exec_id="e"))
    await shim.call("Kill", signal=int(signal.SIGTERM))
    await shim.call("Wait")
    assert (await waiting).exit_status == 128 + signal.SIGKILL
    await shim.call("Delete")
    await shim.shutdown()
    assert task_events(containerd.events.items)[-4:] == [
        ("/tasks/exit", "e"), ("/tasks/exit", shim.id), ("/tasks/delete", "e"), ("/tasks/delete", shim.id),
    ]  # fmt: skip


async def test_out_of_memory(containerd: FakeContainerd, agent: FakeAgent, shim: Shim) -> None:
    await shim.create()
    agent.out_of_memory("unknown")
    agent.out_of_memory(shim.id)
    await containerd.event(events_pb2.TaskOOM)
    agent.out_of_memory(shim.id)
    assert (await containerd.event(events_pb2.TaskOOM, nth=2)).container_id == shim.id
    topics = [topic for topic, _ in task_events(containerd.events.items)]
    assert topics == ["/tasks/create", "/tasks/oom", "/tasks/oom"]


async def test_what_the_agent_is_told(containerd: FakeContainerd, agent: FakeAgent, name: str) -> None:
    resolv_conf = containerd.folder / "resolv.conf"
    resolv_conf.write_text("nameserver 192.0.2.1\nsearch example.org\n")
    mounts = [
        {"destination": "/etc/resolv.conf", "type": "bind", "source": str(resolv_conf), "options": ["rbind", "ro"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]},
    ]  # fmt: skip
    init = process(["/bin/sleep", "100"], env=["A=b"], cwd="/tmp")
    bundle = containerd.bundle(name, spec(init, hostname="h" * 70, mounts=mounts))
    shim = await containerd.start(name, bundle)
    await shim.create()
    sandbox = await agent.request("CreateSandbox")
    assert (sandbox.sandbox_id, sandbox.hostname) == (name, "h" * 64)
    assert list(sandbox.dns) == ["nameserver 192.0.2.1", "search example.org", ""]
    assert [storage.driver for storage in sandbox.storages] == [
        "ephemeral"
    ]  # nothing is shared in these tests
    request = await agent.request("CreateContainer")
    oci = request.OCI
    assert (request.container_id, list(oci.Process.Args)) == (name, ["/bin/sleep", "100"])
    guest = "/run/kata-containers/shared/containers/passthrough"
    assert oci.Root.Path == f"{guest}/{name}/rootfs"
    assert oci.Mounts[0].source.startswith(f"{guest}/sandbox-")
    assert oci.Mounts[0].source.endswith("-resolv.conf")
    assert (oci.Mounts[1].source, oci.Mounts[1].type) == ("/run/kata-containers/sandbox/shm", "bind")
    assert [namespace.Type for namespace in oci.Linux.Namespaces] == ["ipc", "uts", "mount", "cgroup"]


async def test_policy_comes_first(
    containerd: FakeContainerd, agent: FakeAgent, shim: Shim, name: str, config: Path
) -> None:
    await shim.create()  # without a policy nothing is sent
    config.write_text(config.read_text() + 'policy = "package agent_policy"\n')
    other = await containerd.start(f"{name}-2", containerd.bundle(f"{name}-2", spec(shell("exit 0"))))
    await other.create()
    assert (await agent.request("SetPolicy")).policy == "package agent_policy"
    calls = ["CreateSandbox", "CreateContainer"]
    assert agent.methods() == [*calls, "SetPolicy", *calls]


@pytest.mark.parametrize("exec_id", ["", "e"])
async def test_the_exit_does_not_wait_for_the_end_of_the_output(
    containerd: FakeContainerd, agent: FakeAgent, name: str, exec_id: str
) -> None:
    """A child that lives on keeps the streams open; the process has ended all the same."""
    script = shell("sleep 100 & read line; exit 4")
    bundle = containerd.bundle(name, spec(shell("exec sleep 100") if exec_id else script))
    stdio = make_fifos(bundle / "io", "stdin", "stdout")._asdict()
    shim = await containerd.start(name, bundle)
    await shim.create(**({} if exec_id else stdio))
    await shim.call("Start")
    if exec_id:
        await shim.exec(exec_id, script, **stdio)
        await shim.call("Start", exec_id=exec_id)
    with FifoEnd.writer(stdio["stdin"]) as stdin:
        await stdin.write(b"go\n")
        await asyncio.shield(agent.process(name, exec_id).exited)
        async with asyncio.timeout(1):
            end = await containerd.event(events_pb2.TaskExit)
    assert (end.id, end.exit_status) == (exec_id or name, 4)
