"""Ends that nobody planned: whoever dies, and however often it is cleaned up, nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import TYPE_CHECKING, Any

import pytest

from config.validate import VIRTIOFSD_PLACES
from shim import paths
from shim.api.gen import events_pb2
from tests.support import host
from tests.support.bundles import make_fifos, shell, spec
from tests.support.fake_containerd import task_events
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim


@pytest.fixture
async def shim(containerd: FakeContainerd, name: str) -> Shim:
    """A shim with a running container that has FIFOs and a bind mount."""
    data = containerd.folder / "data"
    data.mkdir()
    mounts = [{"destination": "/data", "type": "bind", "source": str(data), "options": ["rbind"]}]
    bundle = containerd.bundle(name, spec(shell("exec sleep 100"), mounts=mounts))
    stdio = make_fifos(bundle / "io")
    shim = await containerd.start(name, bundle)
    await shim.create(**stdio._asdict())
    await shim.call("Start")
    return shim


async def test_delete_after_a_normal_end(containerd: FakeContainerd, shim: Shim) -> None:
    await shim.shutdown(now=True)
    before = time.time()
    for _ in range(2):
        response = await containerd.delete(shim.id, shim.bundle)
        assert (response.exit_status, response.pid) == (137, 0)
        assert before - 1 < response.exited_at.ToNanoseconds() / 1e9 < time.time() + 1


async def test_shim_is_killed(containerd: FakeContainerd, shim: Shim, host_watch: host.HostWatch) -> None:
    vm = (await shim.call("Connect")).task_pid
    os.kill(shim.pid, signal.SIGKILL)
    await host.ended(shim.pid)
    await host.ended(vm)  # the kernel kills it with its parent
    assert (await containerd.delete(shim.id, shim.bundle)).exit_status == 137
    assert [line for line in host_watch.leftovers() if "sleep 100" not in line] == []
    await containerd.delete(shim.id, shim.bundle)


async def test_shim_that_hangs_is_killed_by_delete(containerd: FakeContainerd, shim: Shim) -> None:
    os.kill(shim.pid, signal.SIGSTOP)
    await containerd.delete(shim.id, shim.bundle)
    await host.ended(shim.pid)


async def test_start_after_a_crash(containerd: FakeContainerd, shim: Shim) -> None:
    os.kill(shim.pid, signal.SIGKILL)
    await host.ended(shim.pid)
    second = await containerd.start(shim.id, shim.bundle)
    assert second.pid != shim.pid
    with pytest.raises(RpcError) as caught:
        await second.call("State")
    assert caught.value.code is Code.NOT_FOUND


async def waiting_for_the_end(shim: Shim) -> asyncio.Task[Any]:
    """A `Wait` that the shim has got already: it takes the requests of a connection in order."""
    waiting = asyncio.create_task(shim.call("Wait"))
    await asyncio.create_task(shim.call("State"))
    return waiting


async def test_sigterm(containerd: FakeContainerd, shim: Shim) -> None:
    waiting = await waiting_for_the_end(shim)
    os.kill(shim.pid, signal.SIGTERM)
    assert (await waiting).exit_status == 255
    await host.ended(shim.pid)
    assert task_events(containerd.events.items)[-1] == ("/tasks/exit", shim.id)


async def test_vm_dies(containerd: FakeContainerd, shim: Shim) -> None:
    await shim.exec("e", shell("exec sleep 100"))
    await shim.call("Start", exec_id="e")
    vm = (await shim.call("Connect")).task_pid
    waiting = await waiting_for_the_end(shim)
    killed_at = time.monotonic()
    os.kill(vm, signal.SIGKILL)
    assert (await waiting).exit_status == 255
    await containerd.event(events_pb2.TaskExit, nth=2)
    assert time.monotonic() - killed_at < 2
    assert task_events(containerd.events.items)[-2:] == [("/tasks/exit", "e"), ("/tasks/exit", shim.id)]
    assert {event.body.exit_status for event in containerd.events.items[-2:]} == {255}
    for verb in ("Stats", "Update"):
        with pytest.raises(RpcError) as caught:
            await shim.call(verb, **({"resources": {"value": b"{}"}} if verb == "Update" else {}))
        assert caught.value.code in (Code.UNAVAILABLE, Code.FAILED_PRECONDITION)
    assert (await shim.call("Delete")).exit_status == 255
    await shim.shutdown()


@pytest.fixture
def sharing(config: Path) -> None:
    """A configuration with a real virtiofsd."""
    if not any(os.access(place, os.X_OK) for place in VIRTIOFSD_PLACES):
        pytest.skip(f"needs virtiofsd at {' or '.join(VIRTIOFSD_PLACES)}")
    config.write_text(config.read_text().replace('shared_fs = "none"', 'shared_fs = "virtio-fs"'))


def virtiofsds() -> list[int]:
    return [
        pid
        for pid, words in host.descendants(os.getpid()).items()
        if words.partition(" ")[0].endswith("virtiofsd")
    ]


@pytest.mark.usefixtures("sharing")
async def test_virtiofsd_ends_with_the_sandbox(agent: FakeAgent, shim: Shim) -> None:
    assert virtiofsds() != []
    storages = (await agent.request("CreateSandbox")).storages
    assert (storages[0].driver, storages[0].source, storages[0].fstype) == (
        "virtio-fs",
        "kataShared",
        "virtiofs",
    )
    await shim.shutdown(now=True)
    assert virtiofsds() == []


@pytest.mark.usefixtures("sharing")
async def test_virtiofsd_dies(containerd: FakeContainerd, shim: Shim) -> None:
    """A guest without its files only hangs, so its containers end."""
    waiting = await waiting_for_the_end(shim)
    host.kill(virtiofsds())
    assert (await waiting).exit_status == 255
    await shim.call("Delete")
    await shim.shutdown()


@pytest.mark.usefixtures("sharing")
async def test_virtiofsd_outlives_no_killed_shim(containerd: FakeContainerd, shim: Shim) -> None:
    daemons = virtiofsds()
    os.kill(shim.pid, signal.SIGKILL)
    for pid in (shim.pid, *daemons):
        await host.ended(pid)
    await containerd.delete(shim.id, shim.bundle)
    assert virtiofsds() == []


async def test_delete_does_not_wait_for_a_hung_agent(
    containerd: FakeContainerd, agent: FakeAgent, shim: Shim
) -> None:
    """containerd gives a deletion five seconds."""
    app = containerd.bundle(f"{shim.id}-app", spec(shell("exit 0")))
    await shim.create(app.name, bundle=app)
    await shim.call("Start", id=app.name)
    await shim.call("Wait", id=app.name)
    agent.hang("RemoveContainer")
    started_at = time.monotonic()
    await shim.call("Delete", id=app.name)
    assert time.monotonic() - started_at < 4.5


async def test_delete_of_an_unstarted_container_does_not_wait_for_a_hung_agent(
    containerd: FakeContainerd, agent: FakeAgent, name: str
) -> None:
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exit 0"))))
    await shim.create()
    agent.hang("SignalProcess")
    started_at = time.monotonic()
    assert (await shim.call("Delete")).exit_status == 255
    assert time.monotonic() - started_at < 4.5


async def test_two_deletes_at_once(containerd: FakeContainerd, agent: FakeAgent, shim: Shim) -> None:
    app = containerd.bundle(f"{shim.id}-app", spec(shell("exit 0")))
    await shim.create(app.name, bundle=app)
    await shim.call("Start", id=app.name)
    await shim.call("Wait", id=app.name)
    released = agent.hang("RemoveContainer")
    first = asyncio.create_task(shim.call("Delete", id=app.name))
    await agent.request("RemoveContainer")
    second = asyncio.create_task(shim.call("Delete", id=app.name))
    await shim.call("State")  # the second has arrived
    released.set()
    await first
    with pytest.raises(RpcError) as caught:
        await second
    assert caught.value.code is Code.NOT_FOUND
    await shim.shutdown(now=True)
    topics = [topic for topic, body in task_events(containerd.events.items) if topic == "/tasks/delete"]
    assert topics == ["/tasks/delete"]


async def test_shutdown_that_cannot_remove_everything(containerd: FakeContainerd, shim: Shim) -> None:
    """The daemon ends all the same: what is left is for `delete`."""
    busy = f"{paths.run_dir(shim.id)}/busy"
    os.mkdir(busy)
    # In the daemon's mount namespace, which vanishes with it.
    command = ["nsenter", "-t", str(shim.pid), "-m", "mount", "-t", "tmpfs", "tmpfs", busy]
    assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0
    with pytest.raises(RpcError, match="mounted"):
        await shim.call("Shutdown", now=True)
    await host.ended(shim.pid)
    await containerd.delete(shim.id, shim.bundle)
    assert not os.path.lexists(paths.run_dir(shim.id))


@pytest.mark.parametrize(
    "record",
    ["", "{", "[]", "null", '{"pid": "x"}', '{"pid": 1, "start_time": 1}', "\0" * 100],
    ids=["empty", "cut", "list", "null", "word", "incomplete", "zeroes"],
)
async def test_delete_with_garbage_for_a_record(
    containerd: FakeContainerd, name: str, tmp_path: Path, record: str
) -> None:
    run_dir = host.RUN_ROOT / name
    run_dir.mkdir(parents=True)
    (run_dir / "record.json").write_text(record)
    (run_dir / "qmp.sock").touch()
    shared = host.SHARED_ROOT / name / "rw" / "passthrough"
    shared.mkdir(parents=True)
    (tmp_path / "config.json").write_text("{}")
    await containerd.delete(name, tmp_path)


async def test_delete_in_an_unknown_bundle(containerd: FakeContainerd, name: str, tmp_path: Path) -> None:
    assert (await containerd.delete(name, tmp_path)).exit_status == 137
    (tmp_path / "address").write_text("unix://")
    assert (await containerd.delete(name, tmp_path)).exit_status == 137


async def test_delete_of_a_pods_container_leaves_the_pod_alone(
    containerd: FakeContainerd, shim: Shim
) -> None:
    app = containerd.bundle(f"{shim.id}-app", spec(shell("exit 0")))
    (app / "address").write_text(shim.address)
    await containerd.delete(app.name, app)
    assert (await shim.call("State")).status == 2


async def test_delete_needs_an_id(containerd: FakeContainerd, tmp_path: Path) -> None:
    answer = await containerd.run("delete", "../..", tmp_path)
    assert (answer.code, answer.output) == (1, b"")
    assert "need -id" in answer.errors
