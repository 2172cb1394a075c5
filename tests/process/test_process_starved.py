"""A shim that runs out of descriptors or of disk: one clear line for who asked, and nothing lost or left."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from tests.support import host
from tests.support.bundles import make_fifos, read_all, shell, spec
from tests.support.fake_containerd import task_events
from ttrpc import Client, RpcError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim


@contextmanager
def descriptors(pid: int, more: int) -> Iterator[None]:
    """Only so many more descriptors can be opened by a process."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(fd) for fd in os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 1 + more, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@pytest.fixture
def run_root(host_watch: host.HostWatch) -> Iterator[None]:
    """The place for all sandboxes' directories, for the length of a test: a sandbox cannot remove a mount point."""
    host.RUN_ROOT.mkdir(mode=0o711, exist_ok=True)
    yield
    with suppress(OSError):  # another sandbox of this host is there
        host.RUN_ROOT.rmdir()


@pytest.mark.parametrize("more", [0, 1, 2])
async def test_no_descriptors_for_an_exec(containerd: FakeContainerd, shim: Shim, more: int) -> None:
    stdio = make_fifos(containerd.folder / "io")
    before = host.open_files(shim.pid)
    with descriptors(shim.pid, more):
        with pytest.raises(RpcError, match="Too many open files") as caught:
            await shim.exec("e", shell("echo out"), **stdio._asdict())
            await shim.call("Start", exec_id="e")
        assert "\n" not in caught.value.message
        assert (await shim.call("State")).status == 2
    assert host.open_files(shim.pid) == before
    await shim.exec("again", shell("echo out"), stdout=stdio.stdout)
    reading = asyncio.create_task(read_all(stdio.stdout))
    await shim.call("Start", exec_id="again")
    assert (await shim.call("Wait", exec_id="again")).exit_status == 0
    assert await reading == b"out\n"


async def test_no_descriptors_for_connections(shim: Shim) -> None:
    """Who cannot be let in waits; who is in is served."""
    with descriptors(shim.pid, 0):
        second = await Client.connect_unix(shim.address.removeprefix("unix://"))
        waiting = asyncio.create_task(_pid_by(second, shim))
        assert (await shim.call("State")).status == 2
        assert not waiting.done()
    assert await waiting == shim.pid
    await second.aclose()


async def _pid_by(client: Client, shim: Shim) -> int:
    from shim.api.services import TASK_V2

    method = TASK_V2["Connect"]
    return int((await client.call(TASK_V2.name, method, method.request(id=shim.id))).shim_pid)


async def test_no_descriptors_for_a_second_container(
    containerd: FakeContainerd, agent: FakeAgent, shim: Shim
) -> None:
    app = containerd.bundle(f"{shim.id}-app", spec(shell("exec sleep 100")))
    stdio = make_fifos(app / "io")
    before = host.open_files(shim.pid)
    with descriptors(shim.pid, 0), pytest.raises(RpcError, match="Too many open files") as caught:
        await shim.create(app.name, bundle=app, **stdio._asdict())
    assert "\n" not in caught.value.message
    assert host.open_files(shim.pid) == before
    assert agent.methods().count("CreateContainer") == 1
    await shim.create(app.name, bundle=app)
    await shim.call("Delete", id=app.name)


def in_mount_namespace(containerd: FakeContainerd, preparation: str) -> None:
    """Let the shim run in a mount namespace of its own that a piece of shell script has prepared."""
    real = containerd.program.with_name("real-shim")
    inner = containerd.program.with_name("inner")
    containerd.program.rename(real)
    inner.write_text(f'{preparation}exec {real} "$@"\n')
    containerd.program.write_text(f'#!/bin/sh\nexec unshare --mount --propagation slave sh {inner} "$@"\n')
    containerd.program.chmod(0o755)


@pytest.mark.parametrize("inodes", range(7))
@pytest.mark.usefixtures("run_root")
async def test_full_disk_below_run(containerd: FakeContainerd, name: str, inodes: int) -> None:
    """Whatever cannot be written any more is named, or could be done without."""
    # The root directory of the file system takes one more.
    in_mount_namespace(
        containerd, f"mount -t tmpfs -o nr_inodes={inodes + 1} tmpfs {host.RUN_ROOT} || exit 1\n"
    )
    shim = await containerd.start(name, containerd.bundle(name, spec(shell("exec sleep 100"))))
    try:
        await shim.create()
    except RpcError as err:
        assert "No space left on device" in err.message
        assert f"{host.RUN_ROOT}/{name}" in err.message
        assert "\n" not in err.message
        await shim.shutdown()
        assert containerd.events.items == []
        return
    assert inodes > 3, "a disk that cannot hold the record"
    await shim.call("Start")
    await shim.call("Kill", signal=signal.SIGKILL)
    assert (await shim.call("Wait")).exit_status == 137
    await shim.call("Delete")
    await shim.shutdown()
    topics = ("create", "start", "exit", "delete")
    assert Counter(task_events(containerd.events.items)) == Counter(
        (f"/tasks/{topic}", name) for topic in topics
    )


async def test_full_disk_in_the_bundle(containerd: FakeContainerd, name: str) -> None:
    """`start` cannot write the address: containerd forgets the shim, so there must be none."""
    bundle = containerd.bundle(name, spec(shell("exec sleep 100")))
    in_mount_namespace(
        containerd,
        'config=$(cat config.json); mount -t tmpfs -o nr_inodes=2 tmpfs "$PWD" && cd "$PWD" || exit 1\n'
        'printf %s "$config" > config.json\n',
    )
    answer = await containerd.run("start", name, bundle)
    assert answer.code == 1
    assert b"No space left on device" in answer.output
    assert b"\n" not in answer.output


async def test_no_descriptors_for_a_machine(containerd: FakeContainerd, name: str) -> None:
    """One more with every attempt, until a container runs: each of the others says what was lacking."""
    in_mount_namespace(containerd, "ulimit -n $(cat limit)\n")
    messages = []
    for limit in range(13, 64):
        bundle = containerd.bundle(f"{name}-{limit}", spec(shell("exec sleep 100")))
        (bundle / "limit").write_text(str(limit))
        shim = await containerd.start(bundle.name, bundle)
        try:
            await shim.create()
        except RpcError as err:
            messages.append(err.message)
        else:
            break
        finally:
            await shim.shutdown(now=True)
    assert messages
    for message in messages:
        assert "Too many open files" in message
        # The machine lacked one, or the mount of the root file system that its boot goes on beside.
        assert "the virtual machine did not start" in message or (
            "cannot mount: " in message and message.endswith("/rootfs'")
        )
        assert "\n" not in message
        assert "install" not in message
