"""Containers and the sandbox, with plain processes in place of an engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest_agent.container import CREATED, MAX_ENDED_EXECS, PAUSED, RUNNING, STOPPED
from guest_agent.errors import (
    AlreadyExists,
    EngineFailed,
    InvalidRequest,
    NotFound,
    NotSupported,
    StateConflict,
)
from guest_agent.process import heeds
from guest_agent.sandbox import check_id
from guest_agent.stdio import Stdio
from guest_agent.watch import FileWatch, until
from tests.unit.guest_agent.fake_engine import FakeEngine, container_request

if TYPE_CHECKING:
    from agent_proto.gen import agent_pb2 as pb
    from guest_agent.container import Container
    from guest_agent.reaper import Reaper
    from guest_agent.sandbox import Sandbox


async def make(sandbox: Sandbox, *args: str, container_id: str = "c1") -> Container:
    await sandbox.create_container(container_request(container_id, *args))
    return sandbox.container(container_id)


async def test_a_life(sandbox: Sandbox, engine: FakeEngine, mounts: list[str], tmp_path: Path) -> None:
    container = await make(sandbox, "sh", "-c", "echo out; exit 3")
    assert container.state == CREATED
    assert mounts == [f"{tmp_path}/bundles/c1/rootfs"]
    await container.start()
    assert container.init.stdio.stdout is not None
    assert await container.init.stdio.stdout.read(10) == b"out\n"
    assert await container.init.wait() == 3
    assert container.state == STOPPED
    await sandbox.remove_container("c1", None)
    assert engine.calls == ["prepare", "create c1", "start c1", "forget c1"]
    assert mounts == []
    assert os.listdir(tmp_path / "bundles") == []
    with pytest.raises(NotFound, match="no container 'c1'"):
        sandbox.container("c1")


async def test_removing_kills(sandbox: Sandbox) -> None:
    container = await make(sandbox, "sleep", "1000")
    await container.start()
    await container.exec("e", {"args": ["sleep", "1000"]})
    execed = container.process("e")
    await sandbox.remove_container("c1", None)
    assert await container.init.wait() == 137
    assert await execed.wait() == 137


async def test_streams_of_a_removed_container_end(sandbox: Sandbox) -> None:
    container = await make(sandbox, "sleep", "1000")
    assert container.init.stdio.stdout is not None
    reading = asyncio.create_task(container.init.stdio.stdout.read(10))
    await asyncio.sleep(0)
    await sandbox.remove_container("c1", None)
    assert await reading == b""


async def test_a_failed_create_leaves_nothing(
    sandbox: Sandbox, engine: FakeEngine, mounts: list[str], tmp_path: Path
) -> None:
    engine.failing.add("create")
    with pytest.raises(EngineFailed, match="create was told to fail"):
        await make(sandbox, "true")
    assert mounts == []
    assert os.listdir(tmp_path / "bundles") == []
    engine.failing.clear()
    await make(sandbox, "true")
    await sandbox.remove_container("c1", None)


async def test_a_failed_create_does_not_wait_for_ever_for_processes_that_do_not_end(
    sandbox: Sandbox, engine: FakeEngine, watch: FileWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guest_agent.sandbox.END_LIMIT_S", 0.01)
    directory = tmp_path / "cgroup/kata/c1"

    def hang(container_id: str) -> None:
        directory.mkdir()
        (directory / "cgroup.events").write_text("populated 1\n")

    engine.on_create = hang
    engine.failing.add("create")
    with pytest.raises(EngineFailed, match="create was told to fail"):
        await make(sandbox, "true")
    with pytest.raises(NotFound):
        sandbox.container("c1")
    assert b"a process does not end" in sandbox._log.backlog.take(10_000)
    (directory / "cgroup.events").unlink()


async def test_a_root_that_is_in_place_is_not_mounted_again(
    sandbox: Sandbox, mounts: list[str], tmp_path: Path
) -> None:
    rootfs = f"{tmp_path}/bundles/c1/rootfs"
    os.makedirs(rootfs)
    await sandbox.create_container(container_request("c1", "true", rootfs=rootfs))
    assert mounts == []
    await sandbox.remove_container("c1", None)


async def test_files_in_a_root_that_cannot_be_unmounted_survive(sandbox: Sandbox, tmp_path: Path) -> None:
    await make(sandbox, "true")
    (tmp_path / "bundles/c1/rootfs/precious").touch()
    with pytest.raises(OSError, match="not empty"):
        await sandbox.remove_container("c1", None)
    assert (tmp_path / "bundles/c1/rootfs/precious").exists()
    (tmp_path / "bundles/c1/rootfs/precious").unlink()
    await sandbox.remove_container("c1", None)


async def test_start_is_for_created_containers(sandbox: Sandbox) -> None:
    container = await make(sandbox, "sleep", "1000")
    await container.start()
    with pytest.raises(StateConflict, match="was started before"):
        await container.start()
    dead = await make(sandbox, "true", container_id="c2")
    dead.signal("", signal.SIGKILL)
    await dead.init.wait()
    with pytest.raises(StateConflict, match="has ended before it was started"):
        await dead.start()


async def test_hooks_are_the_engines_business(sandbox: Sandbox, engine: FakeEngine) -> None:
    request = container_request("c1", "true")
    request.OCI.Hooks.Poststop.add(Path="/bin/true")
    await sandbox.create_container(request)
    await sandbox.container("c1").start()
    await sandbox.remove_container("c1", None)
    assert "delete_with_hooks c1" in engine.calls


async def test_exec(sandbox: Sandbox) -> None:
    container = await make(sandbox, "sleep", "1000")
    await container.exec("e", {"args": ["true"]})
    await container.process("e").wait()
    assert container.state == CREATED
    await container.start()
    await container.exec("e", {"args": ["sh", "-c", "exit 4"]})
    first = container.process("e")
    assert await first.wait() == 4
    await container.exec("e", {"args": ["sleep", "1000"]})
    assert first.stdio.stdout is not None
    assert first.stdio.stdout.closed
    for exec_id in ("e", "", "c1"):
        with pytest.raises(AlreadyExists):
            await container.exec(exec_id, {"args": ["true"]})
    with pytest.raises(NotFound, match="no process 'other'"):
        container.process("other")
    assert container.process("") is container.process("c1") is container.init


async def test_ended_execs_are_bounded(sandbox: Sandbox) -> None:
    container = await make(sandbox, "sleep", "1000")
    await container.start()
    for number in range(MAX_ENDED_EXECS + 3):
        await container.exec(f"e{number}", {"args": ["true"]})
        await container.process(f"e{number}").wait()
    await container.exec("last", {"args": ["true"]})
    known = [number for number in range(MAX_ENDED_EXECS + 3) if f"e{number}" in container._execs]
    assert len(known) == MAX_ENDED_EXECS
    assert known[-1] == MAX_ENDED_EXECS + 2


async def test_what_the_host_is_still_to_get_is_kept(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exit code that was not asked for, and output that somebody has begun to read: up to another limit."""
    monkeypatch.setattr("guest_agent.container.MAX_ENDED_EXECS", 2)
    monkeypatch.setattr("guest_agent.container.MAX_OWED_EXECS", 4)
    container = await make(sandbox, "sleep", "1000")
    await container.start()
    await container.exec("slow", {"args": ["echo", "-n", "output"]})
    slow = container.process("slow")
    assert slow.stdio.stdout is not None
    assert await slow.stdio.stdout.read(3) == b"out"
    await slow.wait()
    await container.exec("late", {"args": ["sh", "-c", "exit 7"]})
    late = container.process("late")
    await asyncio.shield(late.exited)
    for number in range(5):
        await container.exec(f"e{number}", {"args": ["true"]})
        await container.process(f"e{number}").wait()
    await container.exec("last", {"args": ["sleep", "1000"]})
    assert list(container._execs) == ["slow", "late", "e3", "e4", "last"]
    assert await slow.stdio.stdout.read(10) == b"put"
    assert await container.process("late").wait() == 7
    for number in range(6):  # nobody asks for these
        await container.exec(f"n{number}", {"args": ["true"]})
        await asyncio.shield(container.process(f"n{number}").exited)
    assert await slow.stdio.stdout.read(10) == b""
    await container.exec("very last", {"args": ["true"]})
    known = set(container._execs)
    assert {"n2", "n3", "n4", "n5"} <= known
    assert not known & {"slow", "late", "n0", "n1"}


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [
        ("trap 'exit 5' TERM; echo; while :; do sleep 0.01; done", signal.SIGTERM, 5),
        ("echo; exec sleep 1000", signal.SIGTERM, 137),  # nobody would hear it
        ("trap 'exit 6' USR1; echo; while :; do sleep 0.01; done", signal.SIGUSR1, 6),
    ],
)
async def test_signals(sandbox: Sandbox, script: str, number: int, code: int) -> None:
    container = await make(sandbox, "sh", "-c", script)
    await container.start()
    assert container.init.stdio.stdout is not None
    await container.init.stdio.stdout.read(1)
    while "exec" in script and b"sleep" not in Path(f"/proc/{container.init.pid}/cmdline").read_bytes()[:6]:
        await asyncio.sleep(0)
    container.signal("", number)
    assert await container.init.wait() == code
    for ending in (signal.SIGTERM, signal.SIGKILL):
        container.signal("", ending)
    with pytest.raises(NotFound, match="process c1 has exited"):
        container.signal("", signal.SIGUSR1)


async def test_sigkill_to_the_container_reaches_all(sandbox: Sandbox) -> None:
    container = await make(sandbox, "sleep", "1000")
    await container.start()
    await container.exec("e", {"args": ["sleep", "1000"]})
    container.signal("", signal.SIGKILL)
    assert await container.process("e").wait() == 137
    assert await container.init.wait() == 137


async def test_a_signal_to_one_process(sandbox: Sandbox) -> None:
    container = await make(sandbox, "sleep", "1000")
    await container.start()
    await container.exec("e", {"args": ["sleep", "1000"]})
    container.signal("e", signal.SIGTERM)
    assert await container.process("e").wait() == 143
    assert container.state == RUNNING


def cgroup_files(tmp_path: Path, *, frozen: int) -> Path:
    directory = tmp_path / "cgroup/kata/c1"
    directory.mkdir(exist_ok=True)
    (directory / "cgroup.freeze").write_text("0")
    (directory / "cgroup.events").write_text(f"populated 0\nfrozen {frozen}\n")
    return directory


async def test_pausing_waits_until_it_is_done(sandbox: Sandbox, tmp_path: Path) -> None:
    container = await make(sandbox, "sleep", "1000")
    with pytest.raises(StateConflict, match="cannot pause container c1: it is created"):
        await container.pause(True)
    await container.start()
    directory = cgroup_files(tmp_path, frozen=0)
    pausing = asyncio.create_task(container.pause(True))
    while (directory / "cgroup.freeze").read_text() != "1":
        await asyncio.sleep(0)
    assert container.state == RUNNING
    cgroup_files(tmp_path, frozen=1)
    await pausing
    assert container.state == PAUSED
    for verb in (container.pause(True), container.exec("e", {"args": ["true"]})):
        with pytest.raises(StateConflict, match="it is paused"):
            await verb
    cgroup_files(tmp_path, frozen=0)
    await container.pause(False)
    assert container.state == RUNNING
    with pytest.raises(StateConflict, match="cannot resume container c1: it is running"):
        await container.pause(False)
    for path in directory.iterdir():
        path.unlink()


async def test_removal_can_be_tried_again_after_its_time_is_up(
    sandbox: Sandbox, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make(sandbox, "sleep", "1000")
    with monkeypatch.context() as patch:
        patch.setattr("guest_agent.cgroup.Cgroup.kill", lambda self: None)
        with pytest.raises(TimeoutError):
            await sandbox.remove_container("c1", 0.05)
    await sandbox.remove_container("c1", None)


# The sandbox


@pytest.mark.parametrize("container_id", ["a", "0", "a.b-c_D", "x" * 200])
def test_good_ids(container_id: str) -> None:
    check_id(container_id)


@pytest.mark.parametrize(
    "container_id",
    ["", ".", "..", "a/b", "/a", "-a", ".a", "a b", "a\n", "\u00e4", "x" * 201, "sandbox", "shared"],
)
def test_bad_ids(container_id: str) -> None:
    with pytest.raises(InvalidRequest):
        check_id(container_id)


def without(request: pb.CreateContainerRequest, what: str) -> pb.CreateContainerRequest:
    if what == "OCI":
        request.ClearField("OCI")
    elif what == "Path":
        request.OCI.Root.ClearField("Path")
    else:
        request.OCI.ClearField("Process")
    return request


@pytest.mark.parametrize("what", ["OCI", "Process", "Path"])
async def test_specifications_with_something_missing(sandbox: Sandbox, what: str) -> None:
    with pytest.raises(InvalidRequest, match="no specification with a process and a root"):
        await sandbox.create_container(without(container_request("c1", "true"), what))


async def test_an_id_is_used_once(sandbox: Sandbox, engine: FakeEngine) -> None:
    engine.hold = asyncio.Event()
    first = asyncio.create_task(make(sandbox, "true"))
    while not engine.calls:
        await asyncio.sleep(0)
    with pytest.raises(AlreadyExists, match="a container c1 already"):
        await make(sandbox, "true")
    engine.hold.set()
    await first
    await sandbox.remove_container("c1", None)


class FakePidNamespace:
    """In place of one that only root could make."""

    path = "/proc/77/ns/pid"
    ended = False

    @classmethod
    def make(cls, reaper: Reaper) -> FakePidNamespace:
        return cls()

    async def end(self) -> None:
        self.ended = True


async def pid_namespace_of(sandbox: Sandbox, tmp_path: Path, container_id: str, kind: str) -> dict[str, Any]:
    """What a new container that shares the pod's pid namespace joins."""
    request = container_request(container_id, "sleep", "1000")
    request.sandbox_pidns = True
    request.OCI.Annotations["io.kubernetes.cri.container-type"] = kind
    await sandbox.create_container(request)
    config = json.loads((tmp_path / f"bundles/{container_id}/config.json").read_text())
    namespaces: list[dict[str, Any]] = config["linux"]["namespaces"]
    return namespaces[-1]


async def test_the_shared_pid_namespace_is_the_sandbox_containers(sandbox: Sandbox, tmp_path: Path) -> None:
    pause = container_request("pause", "sleep", "1000")
    pause.OCI.Annotations["io.kubernetes.cri.container-type"] = "sandbox"
    await sandbox.create_container(pause)
    first = sandbox.container("pause")
    shared = {"type": "pid", "path": f"/proc/{first.init.pid}/ns/pid"}
    assert await pid_namespace_of(sandbox, tmp_path, "c1", "container") == shared
    sandbox.container("c1").signal("", signal.SIGKILL)
    await sandbox.remove_container("c1", None)
    assert await pid_namespace_of(sandbox, tmp_path, "c2", "container") == shared
    first.signal("", signal.SIGKILL)
    await first.init.wait()
    with pytest.raises(StateConflict, match="sandbox container pause has ended"):
        await pid_namespace_of(sandbox, tmp_path, "c3", "container")


async def test_a_pod_without_a_sandbox_container_shares_a_pid_namespace_of_its_own(
    sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guest_agent.pidns.PidNamespace", FakePidNamespace)
    shared = {"type": "pid", "path": FakePidNamespace.path}
    for container_id in ("c1", "c2"):
        assert await pid_namespace_of(sandbox, tmp_path, container_id, "container") == shared
    await sandbox.destroy()


async def test_the_end_of_the_init_ends_the_rest_of_its_container(sandbox: Sandbox) -> None:
    """In a shared pid namespace the kernel does not do it."""
    container, other = await make(sandbox, "sleep", "1000"), await make(sandbox, "true", container_id="c2")
    await container.start()
    await container.exec("e", {"args": ["sleep", "1000"]})
    container.init.signal(signal.SIGTERM)
    assert await container.process("e").wait() == 137
    assert other.state == CREATED


async def test_destroying_removes_everything(sandbox: Sandbox, mounts: list[str]) -> None:
    await make(sandbox, "sleep", "1000")
    await make(sandbox, "sleep", "1000", container_id="c2")
    await sandbox.destroy()
    assert sandbox.stopped.is_set()
    assert mounts == []
    assert sandbox.running == 0


async def test_out_of_memory_is_reported_once_per_kill(sandbox: Sandbox, tmp_path: Path) -> None:
    directory = tmp_path / "cgroup/kata/c1"
    directory.mkdir()
    events = directory / "memory.events"
    events.write_text("oom 0\noom_kill 0\n")
    await make(sandbox, "sleep", "1000")
    waiting = asyncio.create_task(sandbox.oom_reports.next())
    events.write_text("oom 1\noom_kill 0\n")
    events.write_text("oom 1\noom_kill 1\n")
    assert await waiting == "c1"
    again = asyncio.create_task(sandbox.oom_reports.next())
    events.write_text("oom 2\noom_kill 1\n")
    events.write_text("oom 2\noom_kill 2\n")
    assert await again == "c1"
    events.unlink()


@pytest.mark.parametrize("exec_id", ["", "e"])
async def test_running_out_of_memory_is_told_before_the_exit(
    sandbox: Sandbox, tmp_path: Path, exec_id: str
) -> None:
    """Whatever the watch on the file does: the exit of any process looks for itself."""
    container = await make(sandbox, "sleep", "1000")
    await container.start()
    await container.exec("e", {"args": ["sleep", "1000"]})
    told: list[str] = []

    async def poll() -> None:
        told.append(await sandbox.oom_reports.next())

    async def wait() -> None:
        told.append(str(await sandbox.wait("c1", exec_id)))

    polling, waiting = asyncio.create_task(poll()), asyncio.create_task(wait())
    await asyncio.sleep(0)
    directory = tmp_path / "cgroup/kata/c1"
    directory.mkdir()
    events = directory / "memory.events"
    events.write_text("oom 1\noom_kill 1\n")
    container.process(exec_id).signal(signal.SIGKILL)
    await asyncio.gather(polling, waiting)
    assert told == ["c1", "137"]
    events.unlink()


async def test_an_exit_waits_for_a_host_that_asks_again(sandbox: Sandbox, tmp_path: Path) -> None:
    reports = sandbox.oom_reports
    reports.add("before")
    assert await reports.next() == "before"
    reports.add("c1")
    fetched = asyncio.create_task(reports.fetched("c1"))
    await reports.fetched("other")
    assert not fetched.done()
    assert await reports.next() == "c1"
    await fetched


async def test_an_exit_does_not_wait_for_a_host_that_never_asks(sandbox: Sandbox) -> None:
    sandbox.oom_reports.add("c1")
    await sandbox.oom_reports.fetched("c1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("string_user", {"uid": "nobody"}),
        ("devices", [{"id": "02/01"}]),
        ("shared_mounts", [{"name": "m"}]),
        ("stdin_port", 5),
        ("stdout_port", 5),
        ("stderr_port", 5),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(sandbox: Sandbox, field: str, value: Any) -> None:
    request = container_request("c1", "true")
    request.MergeFrom(type(request)(**{field: value}))
    with pytest.raises(NotSupported, match=f"container c1: {field} of CreateContainerRequest"):
        await sandbox.create_container(request)


async def test_fifty_failures_and_then_a_success(
    sandbox: Sandbox, engine: FakeEngine, mounts: list[str], tmp_path: Path
) -> None:
    def group_of_a_failed_engine(container_id: str) -> None:
        (tmp_path / f"cgroup/kata/{container_id}/inner").mkdir(parents=True)

    engine.failing.add("create")
    engine.on_create = group_of_a_failed_engine
    fds = os.listdir("/proc/self/fd")
    for number in range(50):
        with pytest.raises(EngineFailed):
            await make(sandbox, "true", container_id=f"c{number}")
    assert len(os.listdir("/proc/self/fd")) == len(fds)
    assert mounts == []
    assert os.listdir(tmp_path / "bundles") == []
    assert [path.name for path in (tmp_path / "cgroup/kata").iterdir() if path.is_dir()] == []
    engine.failing.clear()
    engine.on_create = None
    container = await make(sandbox, "true", container_id="c0")
    await container.start()
    assert await container.init.wait() == 0
    await sandbox.remove_container("c0", None)


# What these stand on


async def test_watching_files(watch: FileWatch, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("0")
    waiting = asyncio.create_task(until(watch, str(path), lambda: path.read_text() == "2"))
    for value in ("1", "2"):
        assert not waiting.done()
        path.write_text(value)
    await waiting
    await until(watch, str(path), lambda: True)
    with pytest.raises(FileNotFoundError):
        await until(watch, f"{tmp_path}/nothing", lambda: True)
    handle = watch.add(str(path), lambda: None)
    path.unlink()
    watch.remove(handle)
    watch.remove(handle)


@pytest.mark.parametrize(
    ("script", "expected"),
    [("trap : TERM", True), ("trap '' TERM", True), (":", False)],
)
async def test_which_signals_a_process_heeds(reaper: Reaper, script: str, expected: bool) -> None:
    stdio, theirs = Stdio.pipes()
    with theirs:
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(theirs.fds)]
        pid = os.posix_spawn("/bin/sh", ["sh", "-c", f"{script}; echo; read x"], {}, file_actions=actions)
    done = reaper.watch(pid)
    assert stdio.stdout is not None
    await stdio.stdout.read(1)
    assert heeds(pid, signal.SIGTERM) is expected
    os.kill(pid, signal.SIGKILL)
    await done
    assert not heeds(pid, signal.SIGTERM)
    stdio.close()
