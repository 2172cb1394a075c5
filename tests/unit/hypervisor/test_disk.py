"""What QEMU is told when a disk is plugged in or out, where it finds a place, and what is undone when QEMU says no."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

import pytest

from hypervisor.errors import HotplugRefused, QmpRefused, QmpUnavailable
from hypervisor.qemu import commands
from hypervisor.qemu import disk as disk_module
from hypervisor.qemu.disk import DiskAddress, Disks
from hypervisor.qemu.events import DeviceDeleted
from hypervisor.spec import Disk
from tests.unit.hypervisor.test_cmdline import spec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from hypervisor.qemu.qmp import Monitor


class Qemu:
    """A monitor that obeys, but for the commands in `refused`, as often as the number there says."""

    def __init__(self, **refused: int) -> None:
        self.said: list[tuple[str, Any]] = []
        self.refused = {name.replace("_", "-"): times for name, times in refused.items()}
        self._listeners: list[Callable[[object], None]] = []
        self._devices: dict[str, Any] = {}

    @property
    def commands(self) -> list[str]:
        return [name for name, _ in self.said]

    async def execute(self, command: str, arguments: Any = None, *, fd: int | None = None) -> object:
        self.said.append((command, arguments))
        if self.refused.get(command.replace("_", "-"), 0) > 0:
            self.refused[command.replace("_", "-")] -= 1
            raise QmpRefused(command, "GenericError", "no")
        if command == "add-fd":
            return {"fdset-id": len(self.said), "fd": 9}
        if command == "device_add":
            self._devices[arguments["id"]] = arguments
        if command == "device_del":
            for listener in self._listeners:
                listener(DeviceDeleted(path="/x", device=arguments["id"]))
        if command == "query-named-block-nodes":
            return [{"node-name": "other"}, {"node-name": "d1", "image": {"virtual-size": 1 << 20}}]
        if command == "query-pci":
            behind = [
                {"slot": int(device["addr"], 16), "function": 0, "qdev_id": name}
                for name, device in self._devices.items()
                if "addr" in device
            ]
            bridge = {"slot": 30, "function": 0, "qdev_id": "disk-bridge", "pci_bridge": {"devices": behind}}
            return [{"bus": 0, "devices": [bridge]}]
        return {}

    def listening(self, heard: Callable[[object], None]) -> AbstractContextManager[None]:
        qemu = self

        class Listening:
            def __enter__(self) -> None:
                qemu._listeners.append(heard)

            def __exit__(self, *_: object) -> None:
                qemu._listeners.remove(heard)

        return Listening()

    async def lost(self) -> None:
        import asyncio

        await asyncio.get_running_loop().create_future()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "image"
    path.touch()
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    yield fd
    os.close(fd)


def monitor(qemu: Qemu) -> Monitor:
    return cast("Monitor", qemu)


async def plugged(
    image: int, disk: Disk, **fields: Any
) -> tuple[DiskAddress, dict[str, Any], dict[str, Any]]:
    """Where the guest finds it, its backend and its device."""
    qemu = Qemu()
    address = await Disks(spec(**fields)).plug(monitor(qemu), disk, image)
    words = dict(qemu.said)
    return address, words["blockdev-add"], words["device_add"]


async def test_a_virtio_disk(image: int) -> None:
    address, backend, device = await plugged(image, Disk(id="d1"), disk_places=True)
    assert address == ("blk", "1e/01")
    assert backend == {"driver": "file", "node-name": "d1", "filename": "/dev/fdset/1", "read-only": False}
    assert device == {
        "driver": "virtio-blk-pci", "id": "d1", "bus": "disk-bridge", "addr": "01", "disable-legacy": "on",
        "drive": "d1",
    }  # fmt: skip


async def test_all_options(image: int) -> None:
    _, backend, device = await plugged(
        image,
        Disk(id="d1", shared=True, discard=True),
        disk_places=True,
        disk_aio="native",
        disk_cache_direct=True,
        disk_cache_no_flush=False,
        disk_queue_size=64,
        disk_queues=2,
        disk_logical_sector_bytes=512,
        disk_physical_sector_bytes=4096,
        spare_iothreads=1,
    )
    options = {
        name: value for name, value in backend.items() if name not in ("driver", "node-name", "filename")
    }
    assert options == {
        "read-only": False, "aio": "native", "cache": {"direct": True, "no-flush": False}, "discard": "unmap",
    }  # fmt: skip
    assert device.items() >= {
        "queue-size": 64, "num-queues": 2, "iothread": "spare-io0", "share-rw": True, "logical_block_size": 512,
        "physical_block_size": 4096,
    }.items()  # fmt: skip


async def test_nobody_writes_to_a_disk_that_is_read_only(image: int) -> None:
    disk = Disk(id="d1", read_only=True, shared=True, discard=True)
    _, backend, device = await plugged(image, disk, disk_places=True)
    assert backend["read-only"] is True
    assert "discard" not in backend
    assert device["share-rw"] is True  # others may write all the same


async def test_a_scsi_disk(image: int) -> None:
    address, _, device = await plugged(
        image, Disk(id="d1"), scsi=True, disk_places=True, disk_queue_size=64, disk_logical_sector_bytes=4096
    )
    assert address == ("scsi", "0:0")
    assert device == {
        "driver": "scsi-hd", "id": "d1", "bus": "scsi0.0", "scsi-id": 0, "lun": 0, "drive": "d1",
        "logical_block_size": 4096,
    }  # fmt: skip


async def test_a_disk_on_a_channel(image: int) -> None:
    address, _, device = await plugged(
        image, Disk(id="d1"), arch="s390x", disk_places=True, iommu_platform=True
    )
    assert address == ("blk-ccw", "0.0.1000")
    assert device == {
        "driver": "virtio-blk-ccw", "id": "d1", "devno": "fe.0.1000", "iommu_platform": True, "drive": "d1",
    }  # fmt: skip


async def test_block_devices_and_what_is_neither(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        qemu = Qemu()
        with pytest.raises(HotplugRefused, match="neither a block device nor a regular file"):
            await Disks(spec(disk_places=True)).plug(monitor(qemu), Disk(id="d1"), fd)
        assert qemu.said == []
    finally:
        os.close(fd)


async def test_places_are_used_again(image: int) -> None:
    qemu = Qemu()
    disks = Disks(spec(scsi=True))
    for name, unit in (("a", 0), ("b", 1)):
        assert await disks.plug(monitor(qemu), Disk(id=name), image) == ("scsi", f"0:{unit}")
    await disks.unplug(monitor(qemu), "a")
    assert qemu.commands[-3:] == ["device_del", "blockdev-del", "remove-fd"]
    await disks.unplug(monitor(qemu), "a")  # gone already
    assert qemu.commands[-3:] == ["device_del", "blockdev-del", "remove-fd"]
    assert (await disks.plug(monitor(qemu), Disk(id="c"), image)).address == "0:0"
    assert (await disks.plug(monitor(qemu), Disk(id="d"), image)).address == "0:2"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the machine was made without places for disks; set disable_block_device_use to false"),
        ({"disk_places": True}, "all 30 places for disks are taken; set block_device_driver to virtio-scsi"),
        ({"disk_places": True, "arch": "aarch64"}, "all 8 places for disks are taken"),
    ],
)
async def test_no_place_is_left(image: int, fields: dict[str, Any], message: str) -> None:
    qemu = Qemu()
    disks = Disks(spec(**fields))
    disks._taken.update(range(30))
    with pytest.raises(HotplugRefused, match=f"cannot plug in disk d1: {message}"):
        await disks.plug(monitor(qemu), Disk(id="d1"), image)
    assert qemu.said == []


@pytest.mark.parametrize(
    ("refused", "undone"),
    [
        ({"add_fd": 1}, []),
        ({"blockdev_add": 1}, ["remove-fd"]),
        ({"device_add": 1}, ["blockdev-del", "remove-fd"]),
        ({"device_add": 1, "blockdev_del": 1}, ["blockdev-del", "blockdev-del", "remove-fd"]),
    ],
)
async def test_a_refused_disk_leaves_nothing(image: int, refused: dict[str, int], undone: list[str]) -> None:
    qemu = Qemu(**refused)
    disks = Disks(spec(disk_places=True))
    with pytest.raises((HotplugRefused, QmpRefused), match="no"):
        await disks.plug(monitor(qemu), Disk(id="d1"), image)
    assert [name for name in qemu.commands if "add" not in name] == undone
    # Its place is free.
    assert (await disks.plug(monitor(qemu), Disk(id="d2"), image)).address == "1e/01"


@pytest.mark.parametrize("answer", ["refused", "without the disk"])
async def test_a_disk_that_nobody_finds_is_taken_out(
    image: int, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is plugged in by then, and QEMU does not say where."""
    qemu = Qemu(query_pci=1 if answer == "refused" else 0)
    disks = Disks(spec(disk_places=True))
    with monkeypatch.context() as patched, pytest.raises((HotplugRefused, QmpRefused), match="no"):
        if answer != "refused":
            patched.setattr(commands, "pci_path", lambda *_: None)
        await disks.plug(monitor(qemu), Disk(id="d1"), image)
    assert qemu.commands[-4:] == ["query-pci", "device_del", "blockdev-del", "remove-fd"]
    assert (await disks.plug(monitor(qemu), Disk(id="d2"), image)).address == "1e/01"  # its place is free


async def test_qemu_that_does_not_let_go_is_told(image: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_module, "_LETTING_GO_S", 0.04)
    qemu = Qemu(blockdev_del=1000)
    disks = Disks(spec(disk_places=True))
    await disks.plug(monitor(qemu), Disk(id="d1"), image)
    with pytest.raises(HotplugRefused, match="disk d1 is unplugged, and QEMU keeps it open"):
        await disks.unplug(monitor(qemu), "d1")
    assert qemu.commands.count("blockdev-del") == 3


async def test_another_size(image: int) -> None:
    qemu = Qemu()
    disks = Disks(spec(disk_places=True))
    await disks.plug(monitor(qemu), Disk(id="d1"), image)
    await disks.resize(monitor(qemu), "d1", 1 << 21)
    assert qemu.said[-1] == ("block_resize", {"node-name": "d1", "size": 1 << 21})
    with pytest.raises(
        HotplugRefused, match=f"disk d1 {1 << 19} bytes large: it has {1 << 20}, and only grows"
    ):
        await disks.resize(monitor(qemu), "d1", 1 << 19)
    assert qemu.commands[-1] == "query-named-block-nodes"
    qemu.refused["block-resize"] = 1
    with pytest.raises(HotplugRefused, match=r"bytes large: .*; make what is on it so large first"):
        await disks.resize(monitor(qemu), "d1", 1 << 22)


async def test_a_monitor_that_is_gone(image: int) -> None:
    class Gone(Qemu):
        async def execute(self, command: str, arguments: Any = None, *, fd: int | None = None) -> object:
            if command == "blockdev-add":
                raise QmpUnavailable("gone")
            return await super().execute(command, arguments, fd=fd)

    with pytest.raises(QmpUnavailable):
        await Disks(spec(disk_places=True)).plug(monitor(Gone()), Disk(id="d1"), image)
