"""A guest in a machine with all devices that few machines have: each does something that can be seen."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest_asyncio

from agent_proto.gen import agent_pb2 as pb
from hypervisor.extension import Extension
from tests.vm.guest import MARKS, PATIENCE_S, Guest, running_guest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import pytest

pytestmark = MARKS

MIB = 1 << 20
IMAGE_BYTES = 3 * MIB
BIG_MIB = 24
# Linux reports every two seconds (PAGE_REPORTING_DELAY); a busy host takes its time.
REPORTS_EVERY_S = 5
HASHES = "root_hash=4f,salt=a0"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    directory = tmp_path_factory.mktemp("guest")
    image = directory / "tools,1.img"
    image.write_bytes(b"tools" + bytes(IMAGE_BYTES - 5))
    changed = {
        "balloon": True,
        "virtio_mem": True,
        "memory_slots": 2,
        "max_memory_mib": 1024,
        "entropy_source": Path("/dev/urandom"),
        "extensions": (Extension(name="tools", image=image, verity_params=HASHES),),
        "disk_aio": "threads",
        "disk_queue_size": 64,
        "scsi": True,
        "spare_iothreads": 1,
        "nested_virtualization": False,
    }
    async with running_guest(directory, changed=changed) as running:
        await running.agent.create_sandbox(pb.CreateSandboxRequest(sandbox_id="sb1"))
        yield running


async def said(guest: Guest, script: str) -> str:
    code, text = await guest.result("sh", "-c", f"{script} 2>&1")
    assert code == 0, text
    return text.decode()


def taken_by(guest: Guest) -> int:
    """Bytes of the guest's memory that the host has given it so far."""
    folder = f"/proc/{guest.machine.pid}/fd"
    found = 0
    for name in os.listdir(folder):
        if os.readlink(f"{folder}/{name}").startswith("/memfd:memory-backend-memfd"):
            found = max(found, os.stat(f"{folder}/{name}").st_blocks * 512)
    return found


async def settled(guest: Guest) -> int:
    """What is taken when it has stopped to change: the guest reports free pages when it gets round to it."""
    async with asyncio.timeout(PATIENCE_S):
        before = taken_by(guest)
        while True:
            await asyncio.sleep(REPORTS_EVERY_S)
            now = taken_by(guest)
            if abs(now - before) < 2 * MIB:
                return now
            before = now


async def test_freed_memory_goes_back_to_the_host(guest: Guest) -> None:
    # What the boot has freed comes first.
    low = await settled(guest)
    await said(guest, f"dd if=/dev/zero of=/tmp/big bs=1M count={BIG_MIB}")
    full = taken_by(guest)
    assert full > low + BIG_MIB * MIB * 3 // 4
    await said(guest, ": > /tmp/big")
    # Only whole blocks of pages are reported, so not quite all of it comes back.
    async with asyncio.timeout(PATIENCE_S):
        while taken_by(guest) > full - BIG_MIB * MIB // 2:
            await asyncio.sleep(0.5)


async def test_random_numbers_come_from_the_host(guest: Guest) -> None:
    assert await said(guest, "cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0\n"


async def test_an_extension_is_a_disk_that_is_found_by_its_name(guest: Guest) -> None:
    text = await said(guest, "cd /sys/block/vda && cat size ro serial")
    assert text.split("\n") == [str(IMAGE_BYTES // 512), "1", "extension-tools"]
    assert f"kata.extension.tools.verity_params={HASHES}" in await said(guest, "cat /proc/cmdline")


async def test_memory_can_be_added(guest: Guest) -> None:
    """The guest's driver has taken the device, whose memory it does not have yet."""
    assert await said(guest, "ls /sys/bus/virtio/drivers/virtio_mem | tail -n 1") != ""
    total = next(line for line in (await said(guest, "cat /proc/meminfo")).splitlines() if "MemTotal" in line)
    assert int(total.split()[1]) < 256 * 1024


async def test_there_is_a_controller_for_disks(guest: Guest) -> None:
    assert "0x0008" in (await said(guest, "cat /sys/bus/virtio/devices/*/device")).split()


async def test_virtualization_is_hidden(guest: Guest) -> None:
    flags = next(line for line in (await said(guest, "cat /proc/cpuinfo")).splitlines() if "flags" in line)
    assert {"vmx", "svm"}.isdisjoint(flags.split())
