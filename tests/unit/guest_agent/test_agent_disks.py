"""How the agent finds disks by their address, and what it tells the container's specification of them."""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from guest_agent import disks
from guest_agent.errors import InvalidRequest, NotFound
from guest_agent.spawn import aside
from guest_agent.storage import Storages, flush
from guest_agent.uevent import Uevents

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from guest_agent.reaper import Reaper


class News(Uevents):
    """Announcements that the test makes: before each look but the first something happens."""

    def __init__(self, *happenings: Callable[[], object]) -> None:
        super().__init__()
        self._happenings = list(happenings)

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if not self._happenings:
                await asyncio.get_running_loop().create_future()
            self._happenings.pop(0)()


def finder(
    root: Path, *happenings: Callable[[], object], patience_s: float = 5
) -> tuple[disks.Finder, list[str]]:
    loaded: list[str] = []
    (root / "dev").mkdir(exist_ok=True)
    found = disks.Finder(
        News(*happenings), loaded.append, patience_s=patience_s, sys=str(root / "sys"), dev=str(root / "dev")
    )
    return found, loaded


def disk(root: Path, place: str, name: str = "vda") -> None:
    (root / "sys" / place / "block" / name).mkdir(parents=True)
    (root / "dev").mkdir(exist_ok=True)
    (root / "dev" / name).touch()


BRIDGE = "devices/pci0000:00/0000:00:1e.0"
PLACES = [
    ("blk", "03", "devices/pci0000:00/0000:00:03.0/virtio2"),
    ("blk", "1e/02", f"{BRIDGE}/0000:01:02.0/virtio3"),
    ("blk", "1e/02/00", f"{BRIDGE}/0000:01:02.0/0000:02:00.0/virtio3"),
    ("blk", "02/00", "devices/platform/4010000000.pcie/pci0000:00/0000:00:02.0/0000:05:00.0/virtio1"),
    ("blk-ccw", "0.0.1000", "bus/ccw/devices/0.0.1000/virtio1"),
    ("scsi", "0:3", "class/scsi_device/2:0:0:3/device"),
    ("scsi", "1:255", "class/scsi_device/0:0:1:255/device"),
]


@pytest.mark.parametrize(("driver", "address", "place"), PLACES)
async def test_a_disk_is_found_where_it_is(tmp_path: Path, driver: str, address: str, place: str) -> None:
    # Others that are not it: another function of the slot, another bus, other units, a driver without a disk.
    for other in (
        f"{BRIDGE}/0000:01:02.1/virtio9",
        f"{BRIDGE}/0000:01:04.0/virtio8",
        "bus/ccw/devices/0.0.1001/virtio9",
        "class/scsi_device/2:0:1:3/device",
        "class/scsi_device/2:1:0:3/device",
    ):
        if "platform" not in place:  # a machine has one root bus
            disk(tmp_path, other, "other")
    disk(tmp_path, place)
    (found, loaded) = finder(tmp_path)
    assert await found.find(driver, address) == f"{tmp_path}/dev/vda"
    assert loaded == (["virtio_scsi", "sd_mod"] if driver == "scsi" else ["virtio_blk"])


async def test_a_disk_is_waited_for_until_it_has_a_device_file(tmp_path: Path) -> None:
    place = tmp_path / "sys" / BRIDGE / "0000:01:02.0"
    happenings: list[Callable[[], object]] = [
        lambda: place.mkdir(parents=True),
        lambda: (place / "virtio3").mkdir(),
        lambda: (place / "virtio3/block/vdb").mkdir(parents=True),
        lambda: (tmp_path / "dev/vdb").touch(),
    ]
    found, _ = finder(tmp_path, *happenings)
    assert await found.find("blk", "1e/02") == f"{tmp_path}/dev/vdb"


async def test_one_that_does_not_come_is_told(tmp_path: Path) -> None:
    found, _ = finder(tmp_path, patience_s=0.01)
    with pytest.raises(NotFound, match=r"did not see blk disk 1e/02 within 0\.01 s; agent\.hotplug_timeout"):
        await found.find("blk", "1e/02")


@pytest.mark.parametrize(
    ("driver", "address"),
    [
        ("blk", ""), ("blk", "2"), ("blk", "../.."), ("blk", "1e/"), ("blk", "1E/02"), ("blk", "/".join(["00"] * 9)),
        ("blk-ccw", "0.0"), ("blk-ccw", "0.0.1000/"), ("blk-ccw", "0..1000"),
        ("scsi", "0"), ("scsi", "0:"), ("scsi", "0:x"), ("scsi", "0:1:2"), ("scsi", "0:٣"),
    ],
)  # fmt: skip
async def test_what_is_no_address(tmp_path: Path, driver: str, address: str) -> None:
    found, loaded = finder(tmp_path)
    with pytest.raises(InvalidRequest, match=f"is no address of a {driver} disk"):
        await found.find(driver, address)
    assert loaded == []


async def test_scsi_hosts_are_told_to_look(tmp_path: Path) -> None:
    scan = tmp_path / "sys/class/scsi_host/host2/scan"
    scan.parent.mkdir(parents=True)
    scan.touch()
    disk(tmp_path, "class/scsi_device/2:0:4:9/device", "sda")
    found, _ = finder(tmp_path)
    assert await found.find("scsi", "4:9") == f"{tmp_path}/dev/sda"
    assert scan.read_text() == "0 4 9"


async def test_addresses_of_storages_become_paths(tmp_path: Path) -> None:
    disk(tmp_path, f"{BRIDGE}/0000:01:02.0/virtio3")
    found, _ = finder(tmp_path)
    storages = [
        pb.Storage(driver="blk", source="1e/02"),
        pb.Storage(driver="blk", source="/dev/vdz"),
        pb.Storage(driver="local", source="1e/02"),
    ]
    await disks.locate(storages, found)
    assert [storage.source for storage in storages] == [f"{tmp_path}/dev/vda", "/dev/vdz", "1e/02"]


def block_file(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    """Let every path be that device: only root makes such files."""
    real = os.stat
    fields = (stat.S_IFBLK | 0o600, *[0] * 9)

    def answer(path: Any, **kwargs: Any) -> Any:
        if str(path).endswith("/dev/vda"):
            return os.stat_result(fields, {"st_rdev": os.makedev(major, minor)})
        return real(path, **kwargs)

    monkeypatch.setattr(os, "stat", answer)


async def test_a_specification_gets_the_guests_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk(tmp_path, f"{BRIDGE}/0000:01:02.0/virtio3")
    found, _ = finder(tmp_path)
    block_file(monkeypatch, 254, 16)
    request = pb.CreateContainerRequest(
        devices=[
            pb.Device(id="1e/02", type="blk", container_path="/dev/xda"),
            pb.Device(id="g0", type="vfio-pci"),
            pb.Device(id="1e/02", type="blk", container_path="/dev/xdb"),
        ]
    )
    linux = request.OCI.Linux
    linux.Devices.add(Path="/dev/null", Type="c", Major=1, Minor=3)
    linux.Devices.add(Path="/dev/xda", Type="b", Major=7, Minor=4, FileMode=0o640, UID=3)
    linux.Resources.Devices.add(Allow=True, Type="b", Major=7, Minor=4, Access="rw")
    linux.Resources.Devices.add(Allow=True, Type="c", Major=7, Minor=4, Access="rw")
    io = linux.Resources.BlockIO
    io.ThrottleReadBpsDevice.add(Major=7, Minor=4, Rate=5)
    io.ThrottleWriteIOPSDevice.add(Major=8, Minor=4, Rate=6)
    await disks.hand_out(request, found)
    assert [device.type for device in request.devices] == ["vfio-pci"]
    assert list(linux.Devices) == [
        oci_pb2.LinuxDevice(Path="/dev/null", Type="c", Major=1, Minor=3),
        oci_pb2.LinuxDevice(Path="/dev/xda", Type="b", Major=254, Minor=16, FileMode=0o640, UID=3),
        oci_pb2.LinuxDevice(Path="/dev/xdb", Type="b", Major=254, Minor=16, FileMode=0o660),
    ]
    rules = [(rule.Type, rule.Major, rule.Minor) for rule in linux.Resources.Devices]
    assert rules == [("b", 254, 16), ("c", 7, 4)]
    limits = [
        (each.Major, each.Minor, each.Rate)
        for each in (*io.ThrottleReadBpsDevice, *io.ThrottleWriteIOPSDevice)
    ]
    assert limits == [(254, 16, 5), (8, 4, 6)]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (pb.Device(id="1e/02", type="blk"), "'' is not an absolute path"),
        (
            pb.Device(type="blk", vm_path="/dev/null", container_path="/dev/x"),
            "/dev/null for /dev/x is not a block",
        ),
    ],
)
async def test_devices_that_cannot_be_given(tmp_path: Path, device: pb.Device, message: str) -> None:
    found, _ = finder(tmp_path)
    with pytest.raises(InvalidRequest, match=message):
        await disks.hand_out(pb.CreateContainerRequest(devices=[device]), found)


# What was written is on the disk before the disk goes


async def test_work_aside_ends_with_its_error(reaper: Reaper, tmp_path: Path) -> None:
    await aside(reaper, lambda: flush(str(tmp_path)))
    with pytest.raises(FileNotFoundError):
        await aside(reaper, lambda: flush(str(tmp_path / "none")))


async def test_only_disks_of_the_user_alone_are_written_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[str] = []
    block_file(monkeypatch, 8, 0)

    class NoModules:
        def load_if_present(self, name: str) -> None:
            calls.append(f"load {name}")

    storages = Storages(NoModules())  # type: ignore[arg-type]
    monkeypatch.setattr("guest_agent.storage.mount", lambda *args: calls.append(f"mount {args[1]}"))
    monkeypatch.setattr("guest_agent.storage.unmount", lambda path: calls.append(f"unmount {path}"))
    one, both = (
        pb.Storage(driver="blk", source="/dev/vda", fstype="ext4", mount_point=str(tmp_path / name))
        for name in ("one", "both")
    )
    local = pb.Storage(driver="local", mount_point=str(tmp_path / "local"))
    await storages.add([one, both, local], "c1")
    await storages.add([both], "c2")
    assert storages.disks_of("c1") == [str(tmp_path / "one")]
    storages.release("c1")
    assert storages.disks_of("c2") == [str(tmp_path / "both")]
    storages.release("c2")
    assert calls == [
        "load ext4", f"mount {tmp_path}/one", "load ext4", f"mount {tmp_path}/both",
        f"unmount {tmp_path}/local", f"unmount {tmp_path}/one", f"unmount {tmp_path}/both",
    ]  # fmt: skip


def test_what_cannot_be_swapped_to_is_named(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 16))
    with pytest.raises(
        InvalidRequest, match=f"^the guest cannot swap to {image}: .*; see that it is a disk prepared"
    ):
        disks.swap_on(str(image))


async def test_numbers_that_are_of_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's second disk has the number that the guest gives the first one."""
    found, _ = finder(tmp_path)
    guests = {"/dev/vda": os.makedev(254, 16), "/dev/vdb": os.makedev(254, 32)}
    fields = (stat.S_IFBLK | 0o600, *[0] * 9)
    real = os.stat

    def answer(path: Any, **kwargs: Any) -> Any:
        return os.stat_result(fields, {"st_rdev": guests[path]}) if path in guests else real(path, **kwargs)

    monkeypatch.setattr(os, "stat", answer)
    request = pb.CreateContainerRequest()
    linux = request.OCI.Linux
    for path, container_path, numbers in (
        ("/dev/vda", "/dev/xda", (7, 4)),
        ("/dev/vdb", "/dev/xdb", (254, 16)),
    ):
        request.devices.add(vm_path=path, type="blk", container_path=container_path)
        linux.Devices.add(Path=container_path, Type="b", Major=numbers[0], Minor=numbers[1])
        linux.Resources.BlockIO.ThrottleReadBpsDevice.add(Major=numbers[0], Minor=numbers[1], Rate=numbers[0])
    await disks.hand_out(request, found)
    limits = [(each.Minor, each.Rate) for each in linux.Resources.BlockIO.ThrottleReadBpsDevice]
    assert limits == [(16, 7), (32, 254)]
