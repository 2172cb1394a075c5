"""A real guest gets more processors and memory while it runs, and gives memory back, again and again."""

from __future__ import annotations

import asyncio
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from agent_proto.gen import agent_pb2
from config.schema import Config, Qemu
from hypervisor.qemu import commands
from hypervisor.qemu.events import BalloonChanged, MemorySizeChanged
from shim.guest import Guest as ShimGuest
from shim.liveness import Liveness
from shim.sizing import Demand, Sizing
from tests.vm.guest import MARKS, PATIENCE_S, running_guest
from tests.vm.test_hotplug import inventory

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
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
        # What the shim does: memory and processors come online.
        async with follows(guest, default_memory=256) as (sizing, settled):
            assert await online(guest) == b"0"
            await sizing.make_room("a", Demand(150_000, 100_000, memory_bytes=300 * MIB))
            assert await online(guest) == b"0-1"
            assert await memory_kib(guest) == at_boot + 128 * 1024
            sizing.forget("a")
            await settled()
            await size_reached(guest, 0)
            assert await online(guest) == b"0"
        assert await resizing.grow_vcpus(9) == 2  # all that there is room for


@asynccontextmanager
async def follows(guest: Guest, **qemu: Any) -> AsyncIterator[tuple[Sizing, Callable[[], Awaitable[None]]]]:
    """The shim's policy for this machine, and a call that has it give back and waits until it has."""
    tasks: list[asyncio.Task[None]] = []
    ours = ShimGuest(guest.agent, guest.machine.pid, Liveness(guest.agent, None, check_s=PATIENCE_S))
    config = Config(hypervisor=msgspec.structs.replace(Qemu(), **qemu))
    sizing = Sizing(guest.machine, ours, config, lambda work, _: tasks.append(asyncio.create_task(work)))

    async def settled() -> None:
        sizing.give_back()
        await asyncio.gather(*tasks)

    yield sizing, settled
    await asyncio.gather(*tasks)


async def test_processors_come_and_go_again_and_again(tmp_path: Path) -> None:
    """Where they cannot go they are parked: the guest's programs have as many as they may use, whichever it is."""
    async with running_guest(tmp_path, changed={"max_vcpus": 4}) as guest:
        await guest.agent.create_sandbox(agent_pb2.CreateSandboxRequest(sandbox_id="s"))
        async with follows(guest, default_memory=256) as (sizing, settled):
            for round in range(ROUNDS):
                more = 2 + round % 3
                await sizing.make_room("a", Demand(more * 100_000, 100_000))
                assert await online(guest) == f"0-{more - 1}".encode()
                sizing.forget("a")
                await settled()
                assert await online(guest) == b"0"
        there = await guest.machine.resizing.vcpus()
        assert there == (4 if guest.machine.resizing.why_vcpus_stay else 1)


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
