"""What containerd may not ask for, and the codes of the answers, on which it acts."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import pytest
from google.protobuf.any_pb2 import Any as ProtoAny

from tests.support.bundles import make_fifos, shell, spec
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from tests.support.fake_agent import FakeAgent
    from tests.support.fake_containerd import FakeContainerd, Shim

SLEEP = shell("exec sleep 100")


@pytest.fixture
async def shim(containerd: FakeContainerd, name: str) -> Shim:
    return await containerd.start(name, containerd.bundle(name, spec(SLEEP)))


async def refused(call: Awaitable[object], code: Code, *words: str) -> None:
    """The call fails with this code, and its text is one line with these words."""
    with pytest.raises(RpcError) as caught:
        await call
    text = str(caught.value)
    assert caught.value.code is code, text
    assert "\n" not in text
    for word in words:
        assert word in text


async def test_unknown_container(shim: Shim) -> None:
    verbs = (
        "State", "Start", "Delete", "Pids", "Pause", "Resume", "Kill", "ResizePty", "CloseIO", "Wait", "Stats",
    )  # fmt: skip
    await shim.create()
    for verb in verbs:
        await refused(shim.call(verb, id="nobody"), Code.NOT_FOUND, "nobody", shim.id)
    await refused(shim.exec("e", SLEEP, id="nobody"), Code.NOT_FOUND, "nobody")
    resources = ProtoAny(value=b"{}")
    await refused(shim.call("Update", id="nobody", resources=resources), Code.NOT_FOUND, "nobody")


async def test_unknown_exec(shim: Shim) -> None:
    await shim.create()
    await shim.call("Start")
    for verb in ("State", "Start", "Delete", "Kill", "ResizePty", "CloseIO", "Wait"):
        await refused(shim.call(verb, exec_id="nobody"), Code.NOT_FOUND, "nobody", shim.id)


async def test_created_twice(shim: Shim, agent: FakeAgent) -> None:
    released = agent.hang("CreateContainer")
    first = asyncio.create_task(shim.create())
    await agent.request("CreateContainer")
    await refused(shim.create(), Code.ALREADY_EXISTS, shim.id)  # while it is being made
    released.set()
    await first
    await refused(shim.create(), Code.ALREADY_EXISTS, shim.id)


async def test_exec_twice(shim: Shim) -> None:
    await shim.create()
    await shim.call("Start")
    await shim.exec("e", SLEEP)
    await refused(shim.exec("e", SLEEP), Code.ALREADY_EXISTS, "e", shim.id)
    await refused(shim.exec(shim.id, SLEEP), Code.ALREADY_EXISTS, shim.id)


async def test_wrong_moment(shim: Shim) -> None:
    """Some of each kind; every method in every state is in the tests of the table."""
    await shim.create()
    await refused(shim.call("Pause"), Code.FAILED_PRECONDITION, "pause", "created")
    await shim.call("Start")
    await refused(shim.call("Start"), Code.FAILED_PRECONDITION, "start", "running")
    await refused(shim.call("Delete"), Code.FAILED_PRECONDITION, "delete", "running")
    await refused(shim.call("Resume"), Code.FAILED_PRECONDITION, "resume", "running")
    await shim.exec("e", SLEEP)
    await refused(shim.call("Kill", exec_id="e", signal=9), Code.FAILED_PRECONDITION, "kill", "started")
    await shim.call("Start", exec_id="e")
    await refused(shim.call("Start", exec_id="e"), Code.FAILED_PRECONDITION, "start", "running")
    await refused(shim.call("Delete", exec_id="e"), Code.FAILED_PRECONDITION, "delete", "running")
    await shim.exec("late", SLEEP)
    await shim.call("Pause")
    await refused(shim.call("Pause"), Code.FAILED_PRECONDITION, "pause", "paused")
    await refused(shim.call("Start", exec_id="late"), Code.FAILED_PRECONDITION, "exec", "paused")
    await refused(shim.exec("f", SLEEP), Code.FAILED_PRECONDITION, "exec", "paused")
    await shim.call("Resume")
    await refused(shim.call("Kill", signal=65), Code.INVALID_ARGUMENT, "signal 65")
    await shim.call("Kill", signal=int(signal.SIGKILL))
    await shim.call("Wait")
    await refused(shim.call("Start"), Code.FAILED_PRECONDITION, "start", "stopped")
    await refused(shim.exec("g", SLEEP), Code.FAILED_PRECONDITION, "exec", "stopped")
    await refused(shim.call("Pause"), Code.FAILED_PRECONDITION, "pause", "stopped")
    await shim.call("Stats")  # the counters outlive the processes
    # containerd takes NOT_FOUND for "is dead already", which is what a killer wants.
    await refused(shim.call("Kill", signal=9), Code.NOT_FOUND, "already finished")
    await refused(shim.call("Kill", exec_id="e", signal=9), Code.NOT_FOUND, "already finished")


async def test_checkpoint_is_not_supported(shim: Shim) -> None:
    await refused(shim.create(checkpoint="/some/where"), Code.UNIMPLEMENTED, "checkpoint")
    await shim.create()
    await refused(shim.call("Checkpoint", path="/some/where"), Code.UNIMPLEMENTED, "Checkpoint")


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
async def test_unknown_scheme(shim: Shim, agent: FakeAgent, stream: str) -> None:
    stdio = make_fifos(shim.bundle / "io")._asdict() | {stream: "gopher://example.org/1"}
    await refused(shim.create(**stdio), Code.INVALID_ARGUMENT, stream, "gopher://")
    await shim.create()
    await shim.call("Start")
    await refused(shim.exec("e", SLEEP, **stdio), Code.INVALID_ARGUMENT, stream, "gopher://")
    await refused(shim.call("State", exec_id="e"), Code.NOT_FOUND)


@pytest.mark.parametrize("value", [b"", b"[]", b"{", b"\xff"], ids=["empty", "list", "cut", "bytes"])
async def test_malformed_json(shim: Shim, value: bytes) -> None:
    await shim.create()
    await shim.call("Start")
    broken = ProtoAny(type_url="types.containerd.io/opencontainers/runtime-spec/1/Process", value=value)
    await refused(shim.call("Exec", exec_id="e", spec=broken), Code.INVALID_ARGUMENT, "process")
    await refused(shim.call("Update", resources=broken), Code.INVALID_ARGUMENT, "resources")


async def test_malformed_process(shim: Shim) -> None:
    await shim.create()
    await shim.call("Start")
    await refused(shim.exec("e", {"args": 5}), Code.INVALID_ARGUMENT, "process.args")


async def test_rootfs_that_cannot_be_mounted(shim: Shim) -> None:
    mount = {"type": "ext4", "source": "/no/such/device", "options": ["ro"]}
    await refused(shim.create(rootfs=[mount]), Code.INTERNAL, "/no/such/device")
    mount = {"type": "bind", "source": str(shim.bundle), "target": "../../rootfs/io", "options": ["bind"]}
    await refused(shim.create(rootfs=[mount]), Code.INTERNAL, "../../rootfs/io")  # nothing leads outside
    await shim.create()


async def test_bundle_without_rootfs(containerd: FakeContainerd, name: str) -> None:
    bundle = containerd.bundle(name, spec(SLEEP, root={"path": "nothing"}))
    shim = await containerd.start(name, bundle)
    await refused(shim.create(), Code.INVALID_ARGUMENT, "nothing")


async def test_mount_of_nothing(containerd: FakeContainerd, name: str) -> None:
    mounts = [{"destination": "/data", "type": "bind", "source": "/no/such/place", "options": ["bind"]}]
    shim = await containerd.start(name, containerd.bundle(name, spec(SLEEP, mounts=mounts)))
    await refused(shim.create(), Code.INVALID_ARGUMENT, "/no/such/place")
