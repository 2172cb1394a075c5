"""A disk that another program of the host serves, here QEMU's storage daemon: the guest reads and writes it, the
program may be started again, and nothing is left when the disk is gone.
"""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from hypervisor.errors import HotplugRefused
from hypervisor.spec import VhostUserDisk
from tests.support.storage_daemon import DAEMON, served
from tests.vm.guest import MARKS, PATIENCE_S, Guest, running_guest, specification
from tests.vm.test_hotplug import inventory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [
    *MARKS,
    pytest.mark.skipif(not DAEMON.exists(), reason="qemu-storage-daemon is not installed"),
]
MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """With a SCSI controller for ordinary disks: those of other programs go another way."""
    changed = {"disk_places": True, "scsi": True, "disk_queues": 1, "vhost_user_reconnect_s": 1}
    directory = tmp_path_factory.mktemp("guest")
    async with running_guest(directory, "agent.hotplug_timeout=60", changed=changed) as running:
        await running.agent.create_sandbox(pb.CreateSandboxRequest(sandbox_id="sb1"))
        yield running


def blank(path: Path) -> Path:
    path.touch()
    os.truncate(path, MIB)
    return path


async def in_a_container(guest: Guest, address: str, script: str) -> str:
    spec = specification(("sh", "-c", script))
    spec.Linux.Devices.add(Path="/dev/xda", Type="b", Major=241, Minor=0, FileMode=0o600)
    container_id = guest.new_id()
    device = pb.Device(id=address, type="blk", container_path="/dev/xda")
    await guest.agent.create_container(
        pb.CreateContainerRequest(container_id=container_id, OCI=spec, devices=[device])
    )
    await guest.agent.start_container(pb.StartContainerRequest(container_id=container_id))
    text = (await guest.output(container_id)).decode()
    assert await guest.wait(container_id) == 0, text
    await guest.remove(container_id)
    return text


async def test_the_guest_reads_and_writes_and_nothing_is_left(guest: Guest, tmp_path: Path) -> None:
    machine = guest.machine
    image, path = blank(tmp_path / "image"), tmp_path / "disk.sock"
    image.write_bytes(b"of the host\n" + image.read_bytes()[12:])
    before = await inventory(machine.monitor, machine.pid)
    with served(image, path):
        address = await machine.plug_vhost_user_disk(VhostUserDisk(id="served1", socket=path))
        assert address.driver == "blk"
        script = "head -n 1 /dev/xda; echo of the guest | dd of=/dev/xda bs=512 seek=1 conv=fsync 2>/dev/null"
        assert await in_a_container(guest, address.address, script) == "of the host\n"
        await machine.unplug_disk("served1")
        # By QEMU's own word: no device, no connection.
        assert await inventory(machine.monitor, machine.pid) == before
    assert image.read_bytes()[512:525] == b"of the guest\n"


async def test_a_program_that_is_started_again_is_found_again(guest: Guest, tmp_path: Path) -> None:
    machine = guest.machine
    image, path = blank(tmp_path / "image"), tmp_path / "disk.sock"
    before = await inventory(machine.monitor, machine.pid)
    disk = VhostUserDisk(id="served2", socket=path)
    with served(image, path):
        address = await machine.plug_vhost_user_disk(disk)
        await in_a_container(guest, address.address, "echo first | dd of=/dev/xda conv=fsync 2>/dev/null")
    with served(image, path):
        async with asyncio.timeout(PATIENCE_S):
            text = await in_a_container(guest, address.address, "dd if=/dev/xda bs=6 count=1 2>/dev/null")
        assert text == "first\n"
        await machine.unplug_disk("served2")
    assert await inventory(machine.monitor, machine.pid) == before


async def test_nobody_serves_it(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "nobody.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    await refused(guest, path, "Connection refused")
    await refused(guest, tmp_path / "nothing.sock", "No such file or directory")


@pytest.mark.parametrize("words", [b"", b"SSH-2.0-x\r\n" * 2, b"SSH"])
async def test_who_serves_it_speaks_otherwise(guest: Guest, tmp_path: Path, words: bytes) -> None:
    """QEMU would wait for an answer, with everything that it does."""
    path = tmp_path / "other.sock"

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        writer.close()

    async with await asyncio.start_unix_server(serve, path):
        await refused(guest, path, "it does not speak vhost-user|Connection reset by peer|Broken pipe")


async def refused(guest: Guest, path: Path, why: str) -> None:
    """With the reason, at once, and the machine is none the worse."""
    machine = guest.machine
    before = await inventory(machine.monitor, machine.pid)
    with pytest.raises(
        HotplugRefused, match=rf"cannot plug in disk served3: {path}: ({why}); start the program that serves"
    ):
        await machine.plug_vhost_user_disk(VhostUserDisk(id="served3", socket=path))
    assert await machine.monitor.query_status() == "running"
    assert await inventory(machine.monitor, machine.pid) == before
