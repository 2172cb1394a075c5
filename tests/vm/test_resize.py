"""A real guest gets more processors and memory while it runs, and gives memory back, again and again."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

from agent_proto.gen import agent_pb2
from config.schema import Config, Qemu
from hypervisor.qemu import commands
from hypervisor.qemu.events import BalloonChanged, MemorySizeChanged
from shim.sizing import Demand, Sizing
from tests.vm.guest import MARKS, PATIENCE_S, running_guest
from tests.vm.test_hotplug import inventory

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.qemu.events import Event
    from tests.vm.guest import Guest

pytestmark = MARKS
ROUNDS = 20
MIB = 2**20


async def memory_kib(guest: Guest) -> int:
    """What the guest's kernel has."""
    _, text = await guest.result("cat", "/proc/meminfo")
    found = re.search(rb"^MemTotal: +([0-9]+) kB$", text, re.MULTILINE)
    assert found is not None
    return int(found[1])


async def online(guest: Guest) -> bytes:
    return (await guest.result("cat", "/sys/devices/system/cpu/online"))[1].strip()


async def size_reached(guest: Guest, size_bytes: int) -> None:
    """Wait until virtio-mem has this size: the guest gives memory back when it gets to it."""
    reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def heard(event: Event) -> None:
        if isinstance(event, MemorySizeChanged) and event.size == size_bytes and not reached.done():
            reached.set_result(None)

    with guest.machine.monitor.listening(heard):
        (device,) = await commands.query_memory_devices(guest.machine.monitor)
        if device.data.size != size_bytes:
            await asyncio.wait_for(reached, PATIENCE_S)


async def test_virtio_mem_and_processors(tmp_path: Path) -> None:
    changed: dict[str, Any] = {
        "virtio_mem": True,
        "memory_slots": 1,
        "max_memory_mib": 768,
        "max_vcpus": 2,
    }
    async with running_guest(tmp_path, changed=changed) as guest:
        # Loads the drivers of the machine's devices.
        await guest.agent.create_sandbox(agent_pb2.CreateSandboxRequest(sandbox_id="s"))
        machine, resizing = guest.machine, guest.machine.resizing
        assert (resizing.most_vcpus, resizing.most_memory_mib) == (2, 768)
        at_boot = await memory_kib(guest)
        before = await inventory(machine.monitor, machine.pid)
        for round in range(ROUNDS):
            await resizing.grow_memory(256 + 100)
            assert await resizing.memory_mib() == 384
            if round == 0:
                assert await memory_kib(guest) == at_boot + 128 * 1024
            assert await resizing.shrink_memory(256)
            await size_reached(guest, 0)
        assert await inventory(machine.monitor, machine.pid) == before
        assert await memory_kib(guest) == at_boot
        # Processors last: emulated ones stay. The shim's own policy has them come online.
        tasks: list[asyncio.Task[None]] = []
        config = Config(hypervisor=Qemu(default_memory=256))
        sizing = Sizing(machine, guest.agent, config, lambda work, _: tasks.append(asyncio.create_task(work)))
        assert await online(guest) == b"0"
        await sizing.make_room("a", Demand(150_000, 100_000, memory_bytes=300 * MIB))
        assert await online(guest) == b"0-1"
        assert await memory_kib(guest) == at_boot + 128 * 1024
        sizing.forget("a")
        sizing.give_back()
        await asyncio.gather(*tasks)
        await size_reached(guest, 0)
        assert await resizing.vcpus() == (2 if resizing.why_vcpus_stay else 1)
        assert await resizing.grow_vcpus(9) == 2  # all that there is room for


async def test_modules_and_a_balloon(tmp_path: Path) -> None:
    changed: dict[str, Any] = {"memory_slots": 3, "max_memory_mib": 1024, "balloon": True}
    async with running_guest(tmp_path, changed=changed) as guest:
        # Loads the drivers of the machine's devices.
        await guest.agent.create_sandbox(agent_pb2.CreateSandboxRequest(sandbox_id="s"))
        resizing = guest.machine.resizing
        details = await guest.agent.get_guest_details(agent_pb2.GuestDetailsRequest(mem_block_size=True))
        assert details.mem_block_size_bytes == 128 * MIB
        at_boot = await memory_kib(guest)
        await resizing.grow_memory(300)
        await resizing.grow_memory(300)  # is there already
        assert await resizing.memory_mib() == 384
        assert await memory_kib(guest) == at_boot + 128 * 1024
        # The guest gives it back to the balloon, and gets it from there before there is a second module.
        assert await resizing.shrink_memory(256)
        await balloon_at(guest, 256)
        await resizing.grow_memory(384)
        await balloon_at(guest, 384)
        assert len(await commands.query_memory_devices(guest.machine.monitor)) == 1
        await resizing.grow_memory(4096)  # all that there is room for
        assert await resizing.memory_mib() == 1024
        assert await memory_kib(guest) == at_boot + 768 * 1024


async def balloon_at(guest: Guest, mib: int) -> None:
    reached: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def heard(event: Event) -> None:
        if isinstance(event, BalloonChanged) and event.actual == mib * MIB and not reached.done():
            reached.set_result(None)

    with guest.machine.monitor.listening(heard):
        if await commands.query_balloon(guest.machine.monitor) != mib * MIB:
            await asyncio.wait_for(reached, PATIENCE_S)
