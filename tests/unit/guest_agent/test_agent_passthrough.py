"""Devices of the host in the guest: found by their way from the root, bound where a container drives them."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from guest_agent.errors import InvalidRequest, NotFound
from guest_agent.passthrough import Finder, hand_out
from guest_agent.service import PASSED_THROUGH
from guest_agent.uevent import Uevents

if TYPE_CHECKING:
    from pathlib import Path

HOST = "0000:3b:00.0"
# A character device that every machine has, in the place of those of VFIO.
NULL = (1, 3)


class Guest:
    """A guest's /sys and /dev. Like the kernel's, its drivers_probe binds a device to the driver that it is to have."""

    def __init__(self, root: Path) -> None:
        self.sys, self.dev = root / "sys", root / "dev"
        self.loaded: list[str] = []
        (self.sys / "devices/pci0000:00").mkdir(parents=True)
        (self.sys / "bus/pci").mkdir(parents=True)
        (self.sys / "bus/pci/drivers_probe").touch()
        (self.dev / "vfio").mkdir(parents=True)
        (self.dev / "vfio/vfio").symlink_to("/dev/null")

    def finder(self, patience_s: float = 60) -> Finder:
        return Finder(
            Uevents(), self.loaded.append, patience_s=patience_s, sys=str(self.sys), dev=str(self.dev)
        )

    def port(self, slot: str, bus: str, above: str = "devices/pci0000:00", own_bus: str = "0000:00") -> str:
        """A port whose bus the guest has numbered; the answer is where its devices are."""
        place = f"{above}/{own_bus}:{slot}.0"
        (self.sys / place / "pci_bus" / bus).mkdir(parents=True)
        return place

    def device(self, place: str, address: str, *, group: str = "", driver: str = "") -> Path:
        folder = self.sys / place / address
        folder.mkdir(parents=True)
        if group:
            (folder / "iommu_group").symlink_to(f"../../kernel/iommu_groups/{group}")
            (self.dev / "vfio" / group).symlink_to("/dev/null")
        if driver:
            drivers = self.sys / "bus/pci/drivers" / driver
            drivers.mkdir(parents=True, exist_ok=True)
            (folder / "driver").symlink_to(drivers)
        return folder


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def request(
    *devices: pb.Device, env: tuple[str, ...] = (), nodes: tuple[str, ...] = ()
) -> pb.CreateContainerRequest:
    spec = oci_pb2.Spec(Process=oci_pb2.Process(Env=env))
    for path in nodes:
        spec.Linux.Devices.add(Path=path, Type="c", Major=240, Minor=1)
    return pb.CreateContainerRequest(container_id="c", OCI=spec, devices=devices)


def device(kind: str, *options: str) -> pb.Device:
    return pb.Device(id="12", type=kind, container_path="/dev/vfio/12", options=options)


def nodes_of(made: pb.CreateContainerRequest) -> dict[str, tuple[str, int, int]]:
    return {node.Path: (node.Type, node.Major, node.Minor) for node in made.OCI.Linux.Devices}


async def test_a_path_leads_from_bus_to_bus_by_the_guests_numbers(guest: Guest) -> None:
    port = guest.port("02", "0000:05")
    guest.device(port, "0000:05:00.0")
    guest.device(port, "0000:05:01.3")
    switch = guest.port("03", "0000:06")
    down = guest.port("01", "0000:09", above=switch, own_bus="0000:06")
    guest.device(down, "0000:09:00.0")
    guest.device("devices/pci0000:00", "0000:00:04.0")
    for path, address in (
        ("02/00", "0000:05:00.0"), ("02/01.3", "0000:05:01.3"), ("03/01/00", "0000:09:00.0"), ("04", "0000:00:04.0"),
    ):  # fmt: skip
        found = await guest.finder().find(path)
        assert found.address == address
        assert os.path.isdir(found.directory)


async def test_expanders_have_root_buses_of_their_own(guest: Guest) -> None:
    port = guest.port("00", "0000:21", above="devices/pci0000:20", own_bus="0000:20")
    guest.device(port, "0000:21:00.0")
    assert (await guest.finder().find("20/00/00")).address == "0000:21:00.0"


async def test_boards_have_their_root_bus_elsewhere(guest: Guest) -> None:
    (guest.sys / "devices/pci0000:00").rmdir()
    root = "devices/platform/4010000000.pcie/pci0000:00"
    guest.device(guest.port("01", "0000:01", above=root), "0000:01:00.0")
    assert (await guest.finder().find("01/00")).address == "0000:01:00.0"


@pytest.mark.parametrize(
    "path", ["", "2/0", "02/../00", "02//00", "02/00.8", "/02", "0g", "/".join(["00"] * 9)]
)
async def test_what_is_no_path(guest: Guest, path: str) -> None:
    with pytest.raises(InvalidRequest, match="is no path of a PCI device"):
        await guest.finder().find(path)


async def test_a_device_that_does_not_come(guest: Guest) -> None:
    guest.port("02", "0000:05")
    for path in ("02/00", "07/00"):
        with pytest.raises(
            NotFound, match=f"^the guest did not see PCI device {path} within 0.01 s; agent.hotplug_timeout"
        ):
            await guest.finder(0.01).find(path)


async def test_a_device_that_comes_is_waited_for(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    news = asyncio.Event()

    async def until(self: Uevents, condition: Any) -> None:
        assert not condition()
        guest.device(guest.port("02", "0000:05"), "0000:05:00.0")
        news.set()
        assert condition()

    monkeypatch.setattr(Uevents, "until", until)
    assert (await guest.finder().find("02/00")).address == "0000:05:00.0"
    assert news.is_set()


async def test_the_kernels_device_leaves_the_container_without_files_of_vfio(guest: Guest) -> None:
    guest.device(guest.port("02", "0000:05"), "0000:05:00.0", driver="virtio-pci")
    env = ("PATH=/bin", f"PCIDEVICE_VENDOR_COM_GPU={HOST.upper()},0000:99:00.0", f"OTHER={HOST}")
    made = request(
        device("vfio-pci-gk", f"{HOST}=02/00"),
        pb.Device(type="blk", id="03"),
        env=env,
        nodes=("/dev/vfio/12", "/dev/vfio/vfio", "/dev/fuse"),
    )
    await hand_out(made, guest.finder())
    assert list(nodes_of(made)) == ["/dev/fuse"]
    assert [other.type for other in made.devices] == ["blk"]
    assert list(made.OCI.Process.Env) == [
        "PATH=/bin", "PCIDEVICE_VENDOR_COM_GPU=0000:05:00.0,0000:99:00.0", f"OTHER={HOST}",
    ]  # fmt: skip
    assert guest.loaded == []


async def test_the_containers_device_is_bound_and_its_group_is_named(guest: Guest) -> None:
    place = guest.device(guest.port("02", "0000:05"), "0000:05:00.0", group="7", driver="vfio-pci")
    made = request(device("vfio-pci", f"{HOST}=02/00"), nodes=("/dev/vfio/12",))
    await hand_out(made, guest.finder())
    assert nodes_of(made) == {"/dev/vfio/7": ("c", *NULL), "/dev/vfio/vfio": ("c", *NULL)}
    assert guest.loaded == ["vfio_iommu_type1", "vfio_pci"]
    assert not (place / "driver_override").exists()


async def test_another_driver_is_told_to_let_go(guest: Guest) -> None:
    place = guest.device(guest.port("02", "0000:05"), "0000:05:00.0", group="7", driver="e1000e")
    made = request(device("vfio-pci", f"{HOST}=02/00"))
    with pytest.raises(InvalidRequest, match=r"0000:05:00\.0 of the guest cannot be bound to vfio-pci"):
        await hand_out(made, guest.finder())  # nothing here binds anything
    assert (place / "driver_override").read_text() == "vfio-pci"
    assert (guest.sys / "bus/pci/drivers/e1000e/unbind").read_text() == "0000:05:00.0"
    assert (guest.sys / "bus/pci/drivers_probe").read_text() == "0000:05:00.0"


async def test_without_an_iommu_no_container_drives_a_device(guest: Guest) -> None:
    guest.device(guest.port("02", "0000:05"), "0000:05:00.0")
    with pytest.raises(InvalidRequest, match=r"in no IOMMU group.*set enable_iommu = true, or vfio_mode"):
        await hand_out(request(device("vfio-pci", f"{HOST}=02/00")), guest.finder())


async def test_a_group_stays_one(guest: Guest) -> None:
    for slot, bus, group in (("02", "0000:05", "7"), ("03", "0000:06", "8")):
        guest.device(guest.port(slot, bus), f"{bus}:00.0", group=group, driver="vfio-pci")
    two = device("vfio-pci", f"{HOST}=02/00", "0000:3b:00.1=03/00")
    with pytest.raises(
        InvalidRequest, match="device 12 is of 2 IOMMU groups of the guest, and is one of the host's"
    ):
        await hand_out(request(two), guest.finder())


async def test_crypto_queues(guest: Guest) -> None:
    (guest.sys / "bus/ap/devices/05.0004").mkdir(parents=True)
    (guest.dev / "z90crypt").symlink_to("/dev/null")
    for kind in ("vfio-ap", "vfio-ap-cold"):
        made = request(device(kind, "05.0004"), nodes=("/dev/vfio/12",))
        await hand_out(made, guest.finder())
        assert nodes_of(made) == {"/dev/z90crypt": ("c", *NULL)}
    for queue, error, told in (
        ("05.0005", NotFound, "did not see crypto queue 05.0005"),
        ("../x", InvalidRequest, "is no crypto queue"),
    ):
        with pytest.raises(error, match=told):
            await hand_out(request(device("vfio-ap", queue)), guest.finder(0.01))


@pytest.mark.parametrize("option", ["", "02/00", "0000:3b:00.0", "x=02/00"])
async def test_what_is_no_option(guest: Guest, option: str) -> None:
    with pytest.raises(InvalidRequest, match="is not ADDRESS=PATH"):
        await hand_out(request(device("vfio-pci-gk", option)), guest.finder())


def test_the_host_is_told_of_all_kinds() -> None:
    assert set(PASSED_THROUGH) == {"vfio-pci", "vfio-pci-gk", "vfio-ap", "vfio-ap-cold"}
