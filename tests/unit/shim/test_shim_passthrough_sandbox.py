"""Containers of a sandbox that ask for devices of the host: these come before the agent is told, and go at the end."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from config import Config
from config.schema import Qemu
from hypervisor.errors import HotplugRefused
from shim.bring_up import RunningGuest
from shim.creation import CreateRequest
from shim.errors import InvalidRequest
from shim.io import Stdio
from shim.pod import Pod
from shim.process import Exit
from shim.sandbox import Sandbox
from tests.support.stub_guest import VM_PID, StubAgent, StubPublisher
from tests.unit.shim.test_shim_passthrough import GPU, NIC, SOUND, World
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from agent_proto.gen import agent_pb2 as pb
    from shim.container import Container


class Pods:
    """A sandbox that is up, of a host with devices; it outlives its containers."""

    def __init__(self, folder: Path, **qemu: Any) -> None:
        self.world = World(folder)
        self.agent = StubAgent()
        self._folder = folder
        boot = SimpleNamespace(
            failure=None,
            bundle=None,
            config=Config(hypervisor=Qemu(**qemu)),
            devices=self.world.devices(**qemu),
            pod=Pod(),
            network=SimpleNamespace(netns=None, catch_up=self._nothing),
            divide=self._nothing,
        )
        share = SimpleNamespace(
            add_rootfs=lambda *_: "/rootfs", rootfs=lambda _: folder / "rootfs", host_mounts=lambda *_: []
        )
        self.sandbox = Sandbox(
            "s", cast("Any", boot), cast("Any", share), cast("Any", StubPublisher()), namespace="n",
            outlives_containers=True,
        )  # fmt: skip
        agent = cast("Any", self.agent)
        machine = cast("Any", self.world.machine)
        machine.pid, machine.stop, machine.vsock = VM_PID, self._nothing, None
        self.sandbox._machine = machine
        self.sandbox._running = RunningGuest(
            cast("Any", boot), machine, agent, self.sandbox._background.begin,
            host_mounts=None, resources=AsyncExitStack(),
        )  # fmt: skip
        self.sandbox._up = asyncio.create_task(self._nothing())

    async def _nothing(self, *_: object) -> None:
        """Is up already."""

    async def create(self, container_id: str, *files: str, **more: Any) -> Container:
        bundle = self._folder / container_id
        bundle.mkdir()
        nodes = [{"path": path, "type": "c", "major": 240, "minor": 1} for path in files]
        spec = {
            "process": {"args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"devices": nodes},
            **more,
        }
        (bundle / "config.json").write_text(json.dumps(spec))
        self.agent.ended[container_id, ""] = asyncio.get_running_loop().create_future()
        return await self.sandbox.create_container(
            CreateRequest(container_id, bundle, (), Stdio("", "", "", False))
        )

    async def delete(self, container: Container) -> None:
        container.init.set_exited(Exit(0, 0))
        container.init.state = type(container.init.state).STOPPED
        await self.sandbox.delete_container(container)

    async def settle(self) -> None:
        while tasks := self.sandbox._background._tasks:
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def told(self) -> list[str]:
        return self.world.machine.told

    def requests(self) -> list[pb.CreateContainerRequest]:
        return [request for method, request in self.agent.calls if method == "create_container"]


@pytest.fixture
async def pods(tmp_path: Path) -> Pods:
    return Pods(tmp_path, hot_plug_vfio="root-port")


async def test_from_create_to_delete(pods: Pods) -> None:
    container = await pods.create("c1", "/dev/vfio/vfio", "/dev/vfio/12")
    assert pods.told == [f"plug {GPU}", f"plug {SOUND}"]
    (request,) = pods.requests()
    assert [(device.type, list(device.options)) for device in request.devices] == [
        ("vfio-pci-gk", [f"{GPU}=02/00", f"{SOUND}=02/10"])
    ]
    assert list(request.OCI.Linux.Devices) == []
    await pods.delete(container)
    await pods.settle()
    assert pods.agent.called("remove_container") == 1
    assert pods.told[2:] == [f"unplug {GPU}", f"unplug {SOUND}"]


async def test_a_container_that_the_agent_refuses_keeps_none(pods: Pods) -> None:
    pods.agent.refuse("create_container", Code.INVALID_ARGUMENT)
    with pytest.raises(RpcError, match="create_container is refused"):
        await pods.create("c1", "/dev/vfio/13")
    await pods.settle()
    assert pods.told == [f"plug {NIC}", f"unplug {NIC}"]


async def test_a_container_with_a_hook_that_is_none_keeps_none(pods: Pods) -> None:
    with pytest.raises(InvalidRequest, match="hook 'relative': want an absolute path"):
        await pods.create("c1", "/dev/vfio/13", hooks={"prestart": [{"path": "relative"}]})
    await pods.settle()
    assert pods.told == [f"plug {NIC}", f"unplug {NIC}"]


async def test_a_device_that_qemu_refuses_is_the_answer(pods: Pods) -> None:
    pods.world.machine.refuses = {NIC}
    with pytest.raises(HotplugRefused, match=f"cannot plug {NIC}"):
        await pods.create("c1", "/dev/vfio/13")
    assert pods.requests() == []


async def test_nothing_is_prepared_for_what_cannot_be_had(tmp_path: Path) -> None:
    pods = Pods(tmp_path)
    with pytest.raises(
        InvalidRequest, match=r"^device /dev/vfio/12 cannot be given to a guest: set hot_plug_vfio"
    ):
        await pods.create("c1", "/dev/vfio/12")
    assert (pods.told, pods.requests()) == ([], [])


async def test_a_guest_that_keeps_a_device_delays_no_deletion(
    pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = await pods.create("c1", "/dev/vfio/13")
    kept = asyncio.Event()

    async def unplug(device: object) -> None:
        await kept.wait()
        raise HotplugRefused("the guest did not let go of it")

    monkeypatch.setattr(pods.world.machine, "unplug_host_device", unplug)
    await pods.delete(container)
    kept.set()
    await pods.settle()


async def test_a_container_whose_create_is_given_up_leaves_guest_and_machine(
    pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A containerd that ends takes its calls with it; the guest goes on making the container."""
    given_back = []
    assert pods.sandbox._running is not None
    monkeypatch.setattr(pods.sandbox._running.sizing, "give_back", lambda: given_back.append(1))
    pods.agent.hold("create_container")
    creating = asyncio.create_task(pods.create("c1", "/dev/vfio/13"))
    await pods.agent.until_called("create_container")
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await pods.settle()
    assert pods.agent.called("remove_container") == 1
    assert pods.told == [f"plug {NIC}", f"unplug {NIC}"]
    assert given_back == [1]


async def test_a_container_whose_create_is_given_up_at_its_end_leaves_the_guest(
    pods: Pods, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest has made it, and the first one waits for the sandbox's control groups."""
    waiting = asyncio.Event()

    async def divided() -> None:
        waiting.set()
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(pods.sandbox._running, "divided", divided)
    creating = asyncio.create_task(pods.create("c1", "/dev/vfio/13"))
    async with asyncio.timeout(10):
        await waiting.wait()
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await pods.settle()
    assert pods.agent.called("remove_container") == 1
    assert pods.told == [f"plug {NIC}", f"unplug {NIC}"]
