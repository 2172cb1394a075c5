"""Devices of the host: what names them, and what has to be so before a guest is given one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hypervisor.errors import DeviceUnavailable
from hypervisor.vfio import HostDevice, devices_named, has_iommufd, names_host_device
from tests.support.fake_sysfs import FakeSysfs

GPU, SOUND, PORT, NIC = "0000:3b:00.0", "0000:3b:00.1", "0000:3a:00.0", "0001:81:00.3"
UUID = "0a0b0c0d-1111-2222-3333-444455556666"
GIVEN = HostDevice(kind="pci", address=GPU, group="12", vendor=0x10DE, device=0x2331, device_class=0x030200)


@pytest.fixture
def sysfs(tmp_path: Path) -> FakeSysfs:
    """A GPU with its sound device behind a port, all in group 12."""
    made = FakeSysfs(tmp_path)
    made.pci(PORT, "12", driver="pcieport", device_class=0x060400)
    made.pci(GPU, "12")
    made.pci(SOUND, "12", device_class=0x040300, ids=(0x10DE, 0x22B9))
    return made


def refusal(name: str, sysfs: FakeSysfs, *, by_own_file: bool = False) -> str:
    with pytest.raises(DeviceUnavailable) as caught:
        devices_named(name, sysfs.host, by_own_file=by_own_file)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize(
    "name", ["/dev/vfio/12", GPU, "3b:00.0", SOUND.upper(), f"/sys/bus/pci/devices/{GPU}/"]
)
def test_a_group_is_given_as_a_whole_and_its_bridges_are_not(sysfs: FakeSysfs, name: str) -> None:
    gpu, sound = devices_named(name, sysfs.host)
    assert gpu == GIVEN
    assert (sound.address, sound.vendor, sound.device, sound.device_class) == (
        SOUND,
        0x10DE,
        0x22B9,
        0x040300,
    )
    assert (gpu.id, gpu.sysfs) == ("vfio-0000-3b-00.0", f"/sys/bus/pci/devices/{GPU}")
    assert gpu.file == Path("/dev/vfio/12")


@pytest.mark.parametrize("driver", ["mlx5_vfio_pci", "nvgrace-gpu-vfio-pci"])
def test_drivers_that_add_to_vfio_pci_are_as_good(sysfs: FakeSysfs, driver: str) -> None:
    sysfs.pci(NIC, "13", driver=driver)
    assert [device.address for device in devices_named("/dev/vfio/13", sysfs.host)] == [NIC]


@pytest.mark.parametrize("name", ["/dev/vfio/devices/vfio3", GPU, "3b:00.0"])
def test_a_device_is_opened_by_its_own_file(sysfs: FakeSysfs, name: str) -> None:
    sysfs.own_file(GPU, "vfio3")
    assert has_iommufd(sysfs.host)
    (device,) = devices_named(name, sysfs.host, by_own_file=True)
    assert (device.address, device.group, device.vendor) == (GPU, "vfio3", 0x10DE)
    assert device.file == device.own_file == Path("/dev/vfio/devices/vfio3")


@pytest.mark.parametrize(("driver", "told"), [("nvidia", "nvidia"), ("", "no driver")])
@pytest.mark.parametrize("name", ["/dev/vfio/20", "/dev/vfio/devices/vfio0"])
def test_the_whole_group_has_to_be_bound(sysfs: FakeSysfs, name: str, driver: str, told: str) -> None:
    sysfs.pci("0000:05:00.0", "20")
    sysfs.own_file("0000:05:00.0", "vfio0")
    sysfs.pci("0000:05:00.1", "20", driver=driver)
    assert refusal(name, sysfs).startswith(
        f"{name}: device 0000:05:00.1 of IOMMU group 20 is bound to {told}, and to be given to a guest the whole group "
        "has to be bound to vfio-pci: driverctl set-override 0000:05:00.1 vfio-pci, or without it: modprobe vfio-pci; "
        "echo vfio-pci > /sys/bus/pci/devices/0000:05:00.1/driver_override; "
    )


def test_mediated_devices_are_named_by_group_and_by_uuid(sysfs: FakeSysfs) -> None:
    sysfs.mediated(UUID, "40", "vfio-pci", driver="nvidia-vgpu-vfio", parent=GPU)
    part = HostDevice(kind="mediated", address=UUID, group="40", parent=GPU)
    assert (part.tells, GIVEN.tells) == (GPU, GPU)
    for name in ("/dev/vfio/40", UUID, UUID.upper(), f"/sys/bus/mdev/devices/{UUID}"):
        assert devices_named(name, sysfs.host) == (part,)
    assert part.sysfs == f"/sys/bus/mdev/devices/{UUID}"


def test_queues_of_crypto_adapters(sysfs: FakeSysfs) -> None:
    sysfs.mediated(UUID, "41", "vfio-ap", queues="05.0004\n05.0047\n")
    (device,) = devices_named("/dev/vfio/41", sysfs.host)
    assert (device.kind, device.queues) == ("ap", ("05.0004", "05.0047"))


@pytest.mark.parametrize(
    ("interface", "driver", "queues", "told"),
    [
        (
            "vfio-ccw",
            "vfio_mdev",
            "",
            "of type vfio-ccw; guests are given those of types vfio-pci and vfio-ap",
        ),
        ("vfio-pci", "", "", "has no driver; load the kernel module vfio_mdev"),
        ("vfio-ap", "vfio_mdev", "", "has no queues; write an adapter to assign_adapter"),
    ],
)
def test_mediated_devices_that_are_not_ready(
    sysfs: FakeSysfs, interface: str, driver: str, queues: str, told: str
) -> None:
    sysfs.mediated(UUID, "40", interface, driver=driver, queues=queues)
    assert told in refusal("/dev/vfio/40", sysfs)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("/dev/vfio/99", "this host has no IOMMU group 99; look at /sys/kernel/iommu_groups"),
        ("/dev/vfio/noiommu-0", "enable the IOMMU in the firmware"),
        ("/dev/vfio/devices/vfio9", "no device is bound to it; bind one to vfio-pci"),
        ("0000:99:00.0", "there is no such PCI device (lspci -D lists them)"),
        ("0000:06:00.0", "device 0000:06:00.0 is in no IOMMU group; enable the IOMMU"),
        ("/dev/vfio/50", "there are only bridges in this IOMMU group"),
        (UUID, f"there is no mediated device {UUID} (mdevctl list)"),
        ("/dev/null", "names no device of the host; it is /dev/vfio/GROUP"),
        ("../../etc/passwd", "names no device of the host"),
        ("/dev/vfio/../vfio/12", "names no device of the host"),
    ],
)
def test_what_is_not_there(sysfs: FakeSysfs, name: str, told: str) -> None:
    sysfs.pci("0000:06:00.0")
    sysfs.pci("0000:07:00.0", "50", device_class=0x060400, driver="pcieport")
    line = refusal(name, sysfs)
    assert line.startswith(name)
    assert told in line


def test_a_group_without_its_file(sysfs: FakeSysfs) -> None:
    (sysfs.root / "dev/vfio/12").unlink()
    assert "/dev/vfio/12 is not there; load the kernel module vfio-pci" in refusal("/dev/vfio/12", sysfs)


def test_an_own_file_needs_iommufd(sysfs: FakeSysfs) -> None:
    assert re.search(
        "no file for the device alone; it needs Linux 6.6", refusal(GPU, sysfs, by_own_file=True)
    )
    sysfs.own_file(GPU, "vfio0")
    (sysfs.root / "dev/iommu").unlink()
    line = refusal("/dev/vfio/devices/vfio0", sysfs)
    assert line.endswith("load the kernel module iommufd, or name the group's file, /dev/vfio/12")


@pytest.mark.parametrize(
    ("path", "is_device"),
    [
        ("/dev/vfio/12", True), ("/dev/vfio/devices/vfio0", True), ("/dev/vfio/noiommu-0", True),
        ("/dev/vfio/vfio", False), ("/dev/iommu", False), ("/dev/null", False),
    ],
)  # fmt: skip
def test_files_that_serve_all_devices_are_none(path: str, is_device: bool) -> None:
    assert names_host_device(path) is is_device
