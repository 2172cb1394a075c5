"""What QEMU is told of a disk that another program serves, where it finds a place, and what is undone."""

from __future__ import annotations

import asyncio
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.errors import HotplugRefused, QmpRefused
from hypervisor.qemu import vhost_user_disk
from hypervisor.qemu.disk import DiskAddress, Disks
from hypervisor.spec import Disk, VhostUserDisk
from tests.unit.hypervisor.test_cmdline import spec
from tests.unit.hypervisor.test_disk import Qemu, image, monitor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

__all__ = ["image"]

# The answer to GET_FEATURES: version 1, a reply, eight bytes.
ANSWER = struct.pack("=IIIQ", 1, 0x5, 8, 1 << 30)


class Host(Qemu):
    """QEMU 7.2."""

    version = (7, 2, 22)


@asynccontextmanager
async def served(path: Path, answer: bytes = ANSWER, *, hang: bool = False) -> AsyncIterator[VhostUserDisk]:
    """A program that answers the first question."""

    ended: list[asyncio.Event] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ended.append(asyncio.Event())
        assert await reader.readexactly(12) == struct.pack("=III", 1, 1, 0)
        writer.write(answer)
        if hang:
            await reader.read()
        writer.close()
        await writer.wait_closed()
        ended[-1].set()

    async with await asyncio.start_unix_server(serve, path):
        yield VhostUserDisk(id="d1", socket=path)
        for event in ended:
            await event.wait()


@pytest.mark.parametrize("scsi", [False, True])
async def test_what_qemu_is_told(tmp_path: Path, scsi: bool) -> None:
    qemu = Host()
    fields: dict[str, Any] = {"disk_places": True, "scsi": scsi, "disk_queue_size": 64, "disk_queues": 2}
    disks = Disks(spec(**fields, vhost_user_reconnect_s=3))
    async with served(tmp_path / "d.sock") as disk:
        found = await disks.plug_vhost_user(monitor(qemu), disk)
    assert found == DiskAddress("blk", "1e/01")
    data = {
        "addr": {"type": "unix", "data": {"path": str(tmp_path / "d.sock")}},
        "server": False,
        "reconnect": 3,
    }
    assert qemu.said[:2] == [
        ("chardev-add", {"id": "d1-socket", "backend": {"type": "socket", "data": data}}),
        (
            "device_add",
            {
                "driver": "vhost-user-blk-pci", "id": "d1", "bus": "disk-bridge", "addr": "01",
                "disable-legacy": "on", "num-queues": 2, "queue-size": 64, "chardev": "d1-socket",
            },
        ),
    ]  # fmt: skip
    await disks.unplug(monitor(qemu), "d1")
    assert qemu.commands[-2:] == ["device_del", "chardev-remove"]
    await disks.unplug(monitor(qemu), "d1")  # gone already
    assert qemu.commands[-2:] == ["device_del", "chardev-remove"]


async def test_places_are_shared_with_other_virtio_disks_only(tmp_path: Path, image: int) -> None:
    for scsi, address in ((False, "1e/02"), (True, "0:0")):
        disks = Disks(spec(disk_places=True, scsi=scsi))
        async with served(tmp_path / f"{scsi}.sock") as disk:
            await disks.plug_vhost_user(monitor(Host()), disk)
        assert (await disks.plug(monitor(Host()), Disk(id="d2"), image)).address == address


@pytest.mark.parametrize(
    ("refused", "undone"),
    [
        ({"chardev_add": 1}, []),
        ({"device_add": 1}, ["chardev-remove"]),
        ({"device_add": 1, "chardev_remove": 1}, ["chardev-remove", "chardev-remove"]),
    ],
)
async def test_a_refused_disk_leaves_nothing(
    tmp_path: Path, refused: dict[str, int], undone: list[str]
) -> None:
    qemu, disks = Host(**refused), Disks(spec(disk_places=True))
    async with served(tmp_path / "d.sock") as disk:
        with pytest.raises(HotplugRefused, match=r"cannot plug in disk d1: .*no.*d\.sock"):
            await disks.plug_vhost_user(monitor(qemu), disk)
        assert [name for name in qemu.commands if "add" not in name] == undone
        assert (await disks.plug_vhost_user(monitor(qemu), disk)).address == "1e/01"


async def test_qemu_that_does_not_let_go_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_user_disk, "_LETTING_GO_S", 0.04)
    qemu, disks = Host(chardev_remove=1000), Disks(spec(disk_places=True))
    async with served(tmp_path / "d.sock") as disk:
        await disks.plug_vhost_user(monitor(qemu), disk)
    with pytest.raises(HotplugRefused, match="disk d1 is unplugged, and QEMU keeps its connection"):
        await disks.unplug(monitor(qemu), "d1")


@pytest.mark.parametrize("fields", [{}, {"disk_places": True, "arch": "s390x"}])
async def test_a_machine_without_places(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(HotplugRefused, match="cannot plug in disk d1: the machine was made without places"):
        await Disks(spec(**fields)).plug_vhost_user(
            monitor(Host()), VhostUserDisk(id="d1", socket=tmp_path / "d.sock")
        )


@pytest.mark.parametrize(
    "answer",
    [b"", ANSWER[:11], b"HTTP/1.1 400 Bad Request\r\n", struct.pack("=IIIQ", 1, 0x1, 8, 0), bytes(20)],
)
async def test_an_answer_of_something_else(tmp_path: Path, answer: bytes) -> None:
    qemu = Host()
    async with served(tmp_path / "d.sock", answer) as disk:
        with pytest.raises(HotplugRefused, match=r"d\.sock: it does not speak vhost-user; start the program"):
            await Disks(spec(disk_places=True)).plug_vhost_user(monitor(qemu), disk)
    assert qemu.said == []


async def test_a_program_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vhost_user_disk, "_ANSWER_S", 0.1)
    async with served(tmp_path / "d.sock", b"", hang=True) as disk:
        with pytest.raises(HotplugRefused, match=r"d\.sock: no answer within 0\.1 s; start the program"):
            await Disks(spec(disk_places=True)).plug_vhost_user(monitor(Host()), disk)


async def test_a_monitor_that_refuses_for_another_reason(tmp_path: Path) -> None:
    qemu, disks = Host(device_del=1), Disks(spec(disk_places=True))
    async with served(tmp_path / "d.sock") as disk:
        await disks.plug_vhost_user(monitor(qemu), disk)
    with pytest.raises((HotplugRefused, QmpRefused)):
        await disks.unplug(monitor(qemu), "d1")
    await disks.unplug(monitor(qemu), "d1")
    assert qemu.commands[-1] == "chardev-remove"


async def test_a_served_disk_that_nobody_finds_is_taken_out(tmp_path: Path) -> None:
    qemu = Host(query_pci=1)
    disks = Disks(spec(disk_places=True))
    async with served(tmp_path / "d.sock") as disk:
        with pytest.raises(QmpRefused, match="no"):
            await disks.plug_vhost_user(monitor(qemu), disk)
        assert qemu.commands[-3:] == ["query-pci", "device_del", "chardev-remove"]
        assert (await disks.plug_vhost_user(monitor(qemu), disk)).address == "1e/01"
