"""Disks that are plugged into a running machine: the guest finds them by their address, mounts them, gives them to
containers, and when they are gone nothing is left of them, neither in QEMU nor on the host.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from agent_proto.gen import oci_pb2
from hypervisor.errors import HotplugRefused
from hypervisor.qemu.disk import Disks
from hypervisor.spec import Disk
from tests.vm.guest import MARKS, Guest, running_guest, specification
from tests.vm.test_hotplug import inventory
from ttrpc import RpcError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from hypervisor.qemu.disk import DiskAddress

pytestmark = MARKS

ROUNDS = 20
MIB = 1 << 20
MOUNT_POINT = "/run/kata-containers/sandbox/storage/volume"
DRIVERS = ("blk", "scsi")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """One machine that has both kinds of places."""
    changed = {
        "disk_places": True,
        "scsi": True,
        "disk_aio": "threads",
        "disk_queue_size": 128,
        "disk_queues": 1,
    }
    params = "agent.hotplug_timeout=60"
    async with running_guest(tmp_path_factory.mktemp("guest"), params, changed=changed) as running:
        await running.agent.create_sandbox(pb.CreateSandboxRequest(hostname="pod", sandbox_id="sb1"))
        yield running


@pytest.fixture(scope="module")
def disks(guest: Guest) -> dict[str, Disks]:
    spec = guest.machine._spec
    return {"blk": Disks(replace(spec, scsi=False)), "scsi": Disks(spec)}


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR) -> Iterator[int]:
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def ext4(folder: Path, name: str = "ext4.img", content: str = "of the image") -> Path:
    image, tree = folder / name, folder / f"{name}.d"
    tree.mkdir()
    (tree / "file").write_text(content)
    command = ["mkfs.ext4", "-q", "-F", "-d", str(tree), str(image), "16M"]
    subprocess.run(
        command, check=True, timeout=60, env=os.environ | {"PATH": f"/usr/sbin:{os.environ['PATH']}"}
    )
    return image


def blank(folder: Path, name: str, size: int = MIB) -> Path:
    image = folder / name
    image.touch()
    os.truncate(image, size)
    return image


async def seen(guest: Guest, address: DiskAddress, path: str = "/dev/none") -> None:
    """The agent looks for the disk first, and only then at what else is in the request."""
    request = pb.CreateContainerRequest(
        container_id=guest.new_id(),
        storages=[pb.Storage(driver=address.driver, source=address.address, mount_point=path)],
    )
    with pytest.raises(RpcError, match="has no specification"):
        await guest.agent.create_container(request)


@pytest.mark.parametrize("driver", DRIVERS)
async def test_disks_come_and_go_and_leave_nothing(
    guest: Guest, disks: dict[str, Disks], tmp_path: Path, driver: str
) -> None:
    monitor, image = guest.machine.monitor, blank(tmp_path, "disk")
    ours = len(os.listdir("/proc/self/fd"))
    before = await inventory(monitor, guest.machine.pid)
    for number in range(ROUNDS):
        disk = Disk(id=f"disk{number}", read_only=number % 2 == 1)
        with opened(image, os.O_RDONLY if disk.read_only else os.O_RDWR) as fd:
            address = await disks[driver].plug(monitor, disk, fd)
        assert address.driver == driver
        await seen(guest, address)
        await disks[driver].unplug(monitor, disk.id)
    after = await inventory(monitor, guest.machine.pid)
    assert after == before
    assert len(os.listdir("/proc/self/fd")) == ours


@pytest.mark.parametrize("driver", DRIVERS)
async def test_a_file_system_is_mounted_and_written_before_its_disk_goes(
    guest: Guest, disks: dict[str, Disks], tmp_path: Path, driver: str
) -> None:
    monitor, image = guest.machine.monitor, ext4(tmp_path)
    with opened(image) as fd:
        address = await disks[driver].plug(monitor, Disk(id="volume"), fd)
    spec = specification(
        ("sh", "-c", "cat /data/file; echo of the container > /data/new; stat -c %g /data/file")
    )
    spec.Mounts.append(oci_pb2.Mount(destination="/data", type="bind", source=MOUNT_POINT, options=["rbind"]))
    storage = pb.Storage(
        driver=driver,
        source=address.address,
        fstype="ext4",
        options=["noatime"],
        mount_point=MOUNT_POINT,
        fs_group=pb.FSGroup(group_id=1234),
    )
    container_id = guest.new_id()
    await guest.agent.create_container(
        pb.CreateContainerRequest(container_id=container_id, OCI=spec, storages=[storage])
    )
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    assert (await guest.output(container_id)).decode() == "of the image1234\n"
    assert await guest.wait(container_id) == 0
    await guest.remove(container_id)
    await disks[driver].unplug(monitor, "volume")
    command = ["/usr/sbin/debugfs", "-R", "cat /new", str(image)]
    said = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    assert said == b"of the container\n"


async def test_a_container_has_the_disk_itself(guest: Guest, disks: dict[str, Disks], tmp_path: Path) -> None:
    """By its path, with the guest's numbers, whatever the host's are; and no other disk."""
    monitor, image, other = guest.machine.monitor, blank(tmp_path, "raw"), blank(tmp_path, "other")
    with opened(image) as fd, opened(other) as other_fd:
        address = await disks["blk"].plug(monitor, Disk(id="raw"), fd)
        hidden = await disks["blk"].plug(monitor, Disk(id="other"), other_fd)
    await seen(guest, hidden)
    show = "ls -l /dev/xda; cat /sys/fs/cgroup/io.max; stat -c '%t %T' /dev/xda"
    spec = specification(("sh", "-c", f"echo written | dd of=/dev/xda conv=fsync 2>/dev/null; {show}"))
    spec.Mounts.add(destination="/sys/fs/cgroup", type="cgroup", source="cgroup", options=["ro"])
    spec.Linux.Devices.add(Path="/dev/xda", Type="b", Major=7, Minor=99, FileMode=0o600)
    spec.Linux.Resources.BlockIO.ThrottleWriteBpsDevice.add(Major=7, Minor=99, Rate=1 << 20)
    device = pb.Device(id=address.address, type=address.driver, container_path="/dev/xda")
    container_id = guest.new_id()
    await guest.agent.create_container(
        pb.CreateContainerRequest(container_id=container_id, OCI=spec, devices=[device])
    )
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    text = (await guest.output(container_id)).decode()
    assert text.startswith("brw-------"), text
    assert "7,  99" not in text
    *_, limits, numbers = text.splitlines()
    major, minor = (int(number, 16) for number in numbers.split())
    assert limits.split() == [f"{major}:{minor}", "rbps=max", f"wbps={1 << 20}", "riops=max", "wiops=max"]
    await guest.wait(container_id)
    await guest.remove(container_id)
    for name in ("raw", "other"):
        await disks["blk"].unplug(monitor, name)
    assert image.read_bytes()[:8] == b"written\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes loop devices")
async def test_a_block_device_of_the_host_cannot_be_in_two_places(
    guest: Guest, disks: dict[str, Disks], tmp_path: Path
) -> None:
    """QEMU's lock keeps a file system from being mounted twice; a disk that is said to be shared is let in."""
    monitor, image = guest.machine.monitor, blank(tmp_path, "backing")
    shown = subprocess.run(
        ["/usr/sbin/losetup", "-f", "--show", str(image)], check=True, capture_output=True, timeout=60
    )
    device = shown.stdout.decode().strip()
    try:
        before = await inventory(monitor, guest.machine.pid)
        with opened(tmp_path / device) as fd, opened(tmp_path / device) as again:
            await seen(guest, await disks["blk"].plug(monitor, Disk(id="first"), fd))
            with pytest.raises(HotplugRefused, match=r"cannot plug in disk second: QEMU refused .*lock"):
                await disks["blk"].plug(monitor, Disk(id="second"), again)
            await disks["blk"].unplug(monitor, "first")
            for name in ("first", "second"):
                await disks["blk"].plug(monitor, Disk(id=name, shared=True), fd)
            for name in ("first", "second"):
                await disks["blk"].unplug(monitor, name)
        assert await inventory(monitor, guest.machine.pid) == before
    finally:
        subprocess.run(["/usr/sbin/losetup", "-d", device], check=True, timeout=60)


async def test_xfs(guest: Guest, disks: dict[str, Disks], tmp_path: Path) -> None:
    image = blank(tmp_path, "xfs", 320 * MIB)
    subprocess.run(["/usr/sbin/mkfs.xfs", "-q", str(image)], check=True, timeout=60)
    with opened(image) as fd:
        address = await disks["blk"].plug(guest.machine.monitor, Disk(id="xfs"), fd)
    spec = specification(("sh", "-c", "df -T /data | tail -n 1"))
    spec.Mounts.append(oci_pb2.Mount(destination="/data", type="bind", source=MOUNT_POINT, options=["rbind"]))
    storage = pb.Storage(driver="blk", source=address.address, fstype="xfs", mount_point=MOUNT_POINT)
    container_id = guest.new_id()
    request = pb.CreateContainerRequest(container_id=container_id, OCI=spec, storages=[storage])
    await guest.agent.create_container(request)
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    assert b" xfs " in await guest.output(container_id)
    await guest.remove(container_id)
    await disks["blk"].unplug(guest.machine.monitor, "xfs")


async def test_all_places_can_be_taken_at_once(guest: Guest, disks: dict[str, Disks], tmp_path: Path) -> None:
    monitor, image = guest.machine.monitor, blank(tmp_path, "many")
    before = await inventory(monitor, guest.machine.pid)
    names = [f"many{number}" for number in range(30)]
    with opened(image, os.O_RDONLY) as fd:
        plugs = [disks["blk"].plug(monitor, Disk(id=name, read_only=True), fd) for name in names]
        addresses = await asyncio.gather(*plugs)
        with pytest.raises(
            HotplugRefused, match="all 30 places for disks are taken; set block_device_driver"
        ):
            await disks["blk"].plug(monitor, Disk(id="more", read_only=True), fd)
    assert len(set(addresses)) == len(names)
    for address in addresses:
        await seen(guest, address)
    await asyncio.gather(*(disks["blk"].unplug(monitor, name) for name in names))
    assert await inventory(monitor, guest.machine.pid) == before
