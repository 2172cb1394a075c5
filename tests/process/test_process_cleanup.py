"""Ends that nobody planned: whoever dies, and however often it is cleaned up, nothing is left."""

from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import signal
import stat
import time
from base64 import b64encode
from pathlib import Path
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
    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim
    from tests.support.fake_qemu import FakeQemu


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
    vm = host.helper(shim.pid, "qemu")
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
    vm = host.helper(shim.pid, "qemu")
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


async def test_logger_outlives_no_killed_shim(containerd: FakeContainerd, name: str) -> None:
    """Also one that reads nothing and would not notice the end of what it reads from."""
    logger = containerd.folder / "logger"
    logger.write_text("#!/bin/sh\nexec 5>&-\nexec sleep 100\n")
    logger.chmod(0o755)
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    await shim.create(stdout=f"binary://{logger}")
    await shim.call("Start")
    helpers = host.descendants(shim.pid)
    assert [words for words in helpers.values() if words == "sleep 100"] == ["sleep 100"]
    os.kill(shim.pid, signal.SIGKILL)
    async with asyncio.timeout(4):
        for pid in (shim.pid, *helpers):
            await host.ended(pid)
    await containerd.delete(name, shim.bundle)


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
    assert (await shim.call("Delete")).exit_status == 137
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


@pytest.mark.parametrize("lost", [[host.RUN_ROOT], [host.SHARED_ROOT], [host.RUN_ROOT, host.SHARED_ROOT]])
async def test_delete_after_the_loss_of_run(
    containerd: FakeContainerd, shim: Shim, host_watch: host.HostWatch, lost: list[Path]
) -> None:
    """As after a restart of the host: no record, and perhaps nothing else either."""
    os.kill(shim.pid, signal.SIGKILL)
    await host.ended(shim.pid)
    for root in lost:
        shutil.rmtree(root / shim.id)
    for _ in range(2):
        assert (await containerd.delete(shim.id, shim.bundle)).exit_status == 137
        assert [line for line in host_watch.leftovers() if "sleep 100" not in line] == []


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


async def test_initial_data_go_with_their_sandbox(
    containerd: FakeContainerd, config: Path, name: str, qemu: FakeQemu, host_watch: host.HostWatch
) -> None:
    """A pod's own, on a disk that QEMU is told of; also after a SIGKILL."""
    annotation = "io.katacontainers.config.hypervisor.cc_init_data"
    toml = b'version = "0.1.0"\nalgorithm = "sha256"\n[data]\n"a.toml" = "secret"\n'
    config.write_text(config.read_text().replace("[agent", 'enable_annotations = ["cc_init_data"]\n[agent'))
    annotations = {annotation: b64encode(gzip.compress(toml)).decode()}
    bundle = containerd.bundle(name, spec(shell("exec sleep 100"), annotations=annotations))
    shim = await containerd.start(name, bundle)
    await shim.create()
    disk = Path(paths.run_dir(name), paths.INITDATA_FILE)
    assert stat.S_IMODE(disk.stat().st_mode) == 0o600
    content = disk.read_bytes()
    assert gzip.decompress(content[16 : 16 + int.from_bytes(content[8:16], "little")]) == toml
    assert any("filename=/dev/fdset/1,read-only=on" in word for word in qemu.argv())
    os.kill(shim.pid, signal.SIGKILL)
    await host.ended(shim.pid)
    assert disk.exists()
    await containerd.delete(name, bundle)
    assert not disk.exists()
    assert [line for line in host_watch.leftovers() if "sleep 100" not in line] == []
