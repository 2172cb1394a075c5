"""A sandbox's disks: who uses them, when they are plugged in and out, and what a failure leaves."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, cast

import pytest

from agent_proto.gen import agent_pb2, oci_pb2
from hypervisor.errors import HotplugRefused
from hypervisor.qemu.disk import DiskAddress
from shim import disks as disks_module
from shim.disk_needs import Need
from shim.disks import Disks
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.spec import Disk


class Machine:
    """Takes disks, but for those named in `refused`; lets go of them when `letting_go` is set."""

    def __init__(self) -> None:
        self.disks: dict[str, Disk] = {}
        self.refused: set[str] = set()
        self.letting_go = asyncio.Event()
        self.letting_go.set()
        self.stuck = False

    async def plug_disk(self, disk: Disk, fd: int) -> DiskAddress:
        await asyncio.sleep(0)
        if disk.id in self.refused:
            raise HotplugRefused("no")
        self.disks[disk.id] = disk
        return DiskAddress("blk", f"1e/{int(disk.id.removeprefix('disk')):02x}")

    async def unplug_disk(self, disk_id: str) -> None:
        await self.letting_go.wait()
        if self.stuck:
            raise HotplugRefused("the guest keeps it")
        del self.disks[disk_id]


@pytest.fixture
async def machine() -> Machine:
    return Machine()


@pytest.fixture
async def disks(machine: Machine) -> Disks:
    return Disks(cast("Any", machine), None)


def image(folder: Path, name: str) -> str:
    path = folder / name
    path.write_bytes(bytes(512))
    return str(path)


def request(container_id: str) -> agent_pb2.CreateContainerRequest:
    return agent_pb2.CreateContainerRequest(container_id=container_id)


async def test_what_the_guest_is_told(disks: Disks, machine: Machine, tmp_path: Path) -> None:
    mount = oci_pb2.Mount(
        type="ext4", source="/x.img", destination="/data", options=["loop", "ro", "noatime", "nosuid"]
    )
    group = agent_pb2.FSGroup(group_id=5)
    needs = [
        Need(
            path=image(tmp_path, "root"),
            fstype="ext4",
            options=["noatime"],
            mount_point="/guest/rootfs",
            discard=True,
        ),
        Need(path=image(tmp_path, "volume"), fstype="xfs", read_only=True, mount=mount, fs_group=group),
        Need(path=image(tmp_path, "raw"), container_path="/dev/xda"),
    ]
    message = request("a")
    attached = await disks.attach(needs, message)
    root, volume = message.storages
    assert (root.driver, root.source, root.fstype, list(root.options), root.mount_point) == (
        "blk", "1e/01", "ext4", ["noatime"], "/guest/rootfs",
    )  # fmt: skip
    assert (volume.source, volume.fs_group.group_id) == ("1e/02", 5)
    assert volume.mount_point == "/run/kata-containers/sandbox/storage/MWUvMDI="
    assert (mount.type, mount.source, list(mount.options)) == (
        "bind",
        volume.mount_point,
        ["rbind", "ro", "nosuid"],
    )
    (device,) = message.devices
    assert (device.type, device.id, device.container_path) == ("blk", "1e/03", "/dev/xda")
    flags = [(disk.read_only, disk.shared, disk.discard) for disk in machine.disks.values()]
    assert flags == [(False, False, True), (True, False, False), (False, True, False)]
    assert attached.named(f"storage {volume.mount_point}: no") == f"{tmp_path / 'volume'}: no"
    assert attached.written
    await attached.release()
    assert machine.disks == {}
    assert not attached.written
    await attached.release()  # once more does no harm


async def test_containers_share_a_disk(disks: Disks, machine: Machine, tmp_path: Path) -> None:
    path = image(tmp_path, "volume")
    messages = [request("a"), request("b")]
    both = await asyncio.gather(*(disks.attach([Need(path=path, fstype="ext4")], each) for each in messages))
    assert list(machine.disks) == ["disk1"]
    assert messages[0].storages[0].mount_point == messages[1].storages[0].mount_point
    # As a device, and for reading only, it is another disk: which QEMU lets in or not.
    other = await disks.attach([Need(path=path, read_only=True, fstype="ext4")], request("c"))
    assert list(machine.disks) == ["disk1", "disk2"]
    assert not other.written
    await both[0].release()
    assert list(machine.disks) == ["disk1", "disk2"]
    await both[1].release()
    assert list(machine.disks) == ["disk2"]
    await other.release()
    assert machine.disks == {}


async def test_all_or_nothing(disks: Disks, machine: Machine, tmp_path: Path) -> None:
    machine.refused = {"disk2"}
    needs = [
        Need(path=image(tmp_path, "one"), fstype="ext4"),
        Need(path=image(tmp_path, "two"), fstype="ext4"),
    ]
    with pytest.raises(HotplugRefused):
        await disks.attach(needs, request("a"))
    assert machine.disks == {}
    assert not disks.writes()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda path: None,
            "cannot be a disk of the guest: cannot mount: No such file or directory; correct its path",
        ),
        (lambda path: path.mkdir(), "neither a block device nor an image file"),
        (lambda path: path.touch(), "cannot be a disk: it is empty"),
    ],
)
async def test_what_cannot_be_a_disk(disks: Disks, tmp_path: Path, make: Any, message: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(InvalidRequest, match=message):
        await disks.attach([Need(path=str(tmp_path / "x"), fstype="ext4")], request("a"))


async def test_a_guest_that_keeps_a_disk_delays_nobody_for_long(
    disks: Disks, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks_module, "_UNPLUG_LIMIT_S", 0.01)
    machine.letting_go.clear()
    attached = await disks.attach([Need(path=image(tmp_path, "x"), fstype="ext4")], request("a"))
    await attached.release()
    assert list(machine.disks) == ["disk1"]
    machine.letting_go.set()
    while machine.disks:
        await asyncio.sleep(0)
    await disks.aclose()


async def test_one_that_was_not_let_go_is_used_again(disks: Disks, machine: Machine, tmp_path: Path) -> None:
    path, machine.stuck = image(tmp_path, "x"), True
    first = await disks.attach([Need(path=path, fstype="ext4")], request("a"))
    await first.release()
    assert list(machine.disks) == ["disk1"]
    second = await disks.attach([Need(path=path, fstype="ext4")], request("b"))
    assert list(machine.disks) == ["disk1"]
    machine.stuck = False
    await second.release()
    assert machine.disks == {}


async def test_the_end_waits_for_no_disk(
    disks: Disks, machine: Machine, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(disks_module, "_UNPLUG_LIMIT_S", 0.01)
    machine.letting_go.clear()
    attached = await disks.attach([Need(path=image(tmp_path, "x"), fstype="ext4")], request("a"))
    await attached.release()
    await disks.aclose()
    assert not disks._leaving


async def test_a_guest_that_keeps_a_disk_delays_no_other_container(
    disks: Disks, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks_module, "_UNPLUG_LIMIT_S", 0.01)
    machine.letting_go.clear()
    attached = await disks.attach([Need(path=image(tmp_path, "x"), fstype="ext4")], request("a"))
    await attached.release()
    async with asyncio.timeout(60):
        await disks.attach([Need(path=image(tmp_path, "y"), fstype="ext4")], request("b"))
    assert list(machine.disks) == ["disk1", "disk2"]
    await disks.aclose()


async def test_who_gives_up_while_a_disk_is_plugged_in_leaves_none(
    disks: Disks, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU is told all of it first: in the middle nothing could be undone."""
    begun, go_on, plug = asyncio.Event(), asyncio.Event(), machine.plug_disk
    sizes = []

    async def slowly(disk: Disk, fd: int) -> DiskAddress:
        begun.set()
        await go_on.wait()
        sizes.append(os.fstat(fd).st_size)
        return await plug(disk, fd)

    monkeypatch.setattr(machine, "plug_disk", slowly)
    need = Need(path=image(tmp_path, "x"), fstype="ext4")
    attaching = asyncio.create_task(disks.attach([need], request("a")))
    await begun.wait()
    attaching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attaching
    go_on.set()
    async with asyncio.timeout(60):
        await asyncio.gather(*disks._leaving)
    assert (sizes, machine.disks) == ([512], {})
    await disks.attach([need], request("b"))
    assert list(machine.disks) == ["disk2"]
