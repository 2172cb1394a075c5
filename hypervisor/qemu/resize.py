"""The size of a running machine: processors and memory that are plugged in, and given back, up to what it was started
with room for.

What is there is asked of QEMU each time, so a guest that lets go of something late spoils no count. Loaded when a
machine changes for the first time.
"""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hypervisor.arch import arch_named
from hypervisor.errors import HotplugRefused, HypervisorError, QmpRefused
from hypervisor.qemu import commands
from hypervisor.qemu.events import AcpiDeviceOst, MemorySizeChanged
from hypervisor.qemu.room import BLOCK_MIB, room_mib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypervisor.qemu.events import Event
    from hypervisor.qemu.qmp import Monitor
    from hypervisor.spec import VmSpec

# A guest takes a memory module within a second, also when emulated; virtio-mem is filled at some 128 MiB in 10 ms.
PLUG_TIMEOUT_S = 30.0
VIRTIO_MEM = "virtio-mem0"
_MIB = 2**20
_PERIPHERAL = "/machine/peripheral/"
_CPU, _DIMM, _BACKEND = "cpu-", "dimm-", "memory-"
_CPU_REMEDY = "lower the containers' CPU limits, or set default_vcpus to what is needed"
_MEMORY_REMEDY = (
    "free memory of the host, its huge pages where the guest's memory is made of them, "
    "or lower the containers' memory limits"
)
_SLOT_REMEDY = "set memory_slots higher, or default_memory to what is needed"
# ACPI 6.5, table 6-11: what a status is about. A device was found on a bus, or by itself.
_INSERTIONS = (0, 1)


class Resizing:
    """Changes the size of one machine. Of each kind one growth at a time, and one shrinking: the caller sees to that.
    Processors may come while others are still about to go."""

    def __init__(self, spec: VmSpec, monitor: Monitor) -> None:
        self._spec = spec
        self._arch = arch_named(spec.arch)
        self._monitor = monitor
        self._leaving: dict[str, int] = {}

    @property
    def most_vcpus(self) -> int:
        """How many processors the machine can have."""
        plugs = self._arch.plugs_vcpus and self._spec.protection is None
        more = plugs or self._spec.parks_vcpus
        return max(self._spec.vcpus, self._spec.max_vcpus) if more else self._spec.vcpus

    @property
    def most_memory_mib(self) -> int:
        """How much memory the machine can have."""
        return self._spec.memory_mib + room_mib(self._spec, self._arch)

    @property
    def why_vcpus_stay(self) -> str:
        """Why processors are not taken out again; empty where they are."""
        if not self._arch.unplugs_vcpus:
            return f"{self._arch.name} machines let no processor go"
        if self._spec.accel == "tcg":
            return "QEMU has no way to take back a processor that it emulates"
        return ""

    async def vcpus(self) -> int:
        """How many processors there are. Raises QmpError."""
        return len(await commands.query_cpus_fast(self._monitor))

    async def grow_vcpus(self, total: int) -> int:
        """Plug processors in until there are `total`, at most `most_vcpus`, beside those that are about to go; the
        guest still has to bring them online. Returns how many there are.

        Raises:
            HotplugRefused: QEMU refused.
            QmpError: QEMU is gone.
        """
        there = await self.vcpus() - sum(self._leaving.values())
        places = [
            *reversed(await commands.query_hotpluggable_cpus(self._monitor))
        ]  # QEMU tells the last one first
        for index, place in enumerate(places):
            if there >= total:
                break
            if place.qom_path is None:
                name = f"{_CPU}{index}"
                with _refusal(f"cannot add processor {name} to the {there} of the machine", _CPU_REMEDY):
                    await commands.device_add(self._monitor, place.type, name, place.props)
                there += place.vcpus_count
        return there

    async def shrink_vcpus(self, total: int) -> int:
        """Take out processors that were plugged in while there are more than `total`. Returns how many there are.

        Raises:
            HotplugRefused: the guest keeps one.
            QmpError: QEMU is gone.
        """
        there = await self.vcpus()
        for place in await commands.query_hotpluggable_cpus(self._monitor):
            device = (place.qom_path or "").removeprefix(_PERIPHERAL)
            if there - place.vcpus_count < total:
                break
            if device.startswith(_CPU):
                self._leaving[device] = place.vcpus_count
                try:
                    await commands.unplug(self._monitor, device)
                finally:
                    del self._leaving[device]
                there -= place.vcpus_count
        return there

    async def grow_memory(self, total_mib: int, block_mib: int = BLOCK_MIB) -> None:
        """Give the guest memory until it has `total_mib`, in whole blocks of its own, at most `most_memory_mib`; wait
        until it has taken it.

        Raises:
            HotplugRefused: the guest does not take it, or QEMU does not give it.
            QmpError: QEMU is gone.
        """
        wanted = min(self._in_blocks(total_mib, block_mib), self.most_memory_mib)
        if self._spec.virtio_mem:
            await self._request(wanted)
            return
        await self._deflate(wanted)
        missing = wanted - await self.memory_mib()
        if missing >= block_mib:
            await self._plug_dimm(missing // block_mib * block_mib)

    async def shrink_memory(self, total_mib: int, block_mib: int = BLOCK_MIB) -> bool:
        """Ask the guest to give memory back until it has `total_mib`; it does when it can. Returns whether it can be
        asked: that takes virtio-mem, or a balloon.

        Raises:
            QmpError: QEMU is gone.
        """
        wanted = self._in_blocks(total_mib, block_mib)
        if self._spec.virtio_mem:
            await self._set_requested(wanted - self._spec.memory_mib)
        elif self._spec.balloon:
            await commands.balloon(self._monitor, wanted * _MIB)
        else:
            return False
        return True

    async def memory_mib(self) -> int:
        """How much memory is plugged in, with what the machine was started with. Raises QmpError."""
        devices = await commands.query_memory_devices(self._monitor)
        # The others are images as memory, in which the guest runs nothing.
        sizes = [d.data.size for d in devices if d.type == "virtio-mem" or _is_ours(d)]
        return self._spec.memory_mib + sum(sizes) // _MIB

    def _in_blocks(self, total_mib: int, block_mib: int) -> int:
        more = max(0, total_mib - self._spec.memory_mib)
        return self._spec.memory_mib + -(-more // block_mib) * block_mib

    async def _deflate(self, wanted_mib: int) -> None:
        """Let the guest have back first what a balloon keeps from it."""
        if self._spec.balloon:
            there = await self.memory_mib()
            if await commands.query_balloon(self._monitor) < min(there, wanted_mib) * _MIB:
                await commands.balloon(self._monitor, min(there, wanted_mib) * _MIB)

    async def _request(self, wanted_mib: int) -> None:
        """Have virtio-mem filled. Raises HotplugRefused, QmpError."""
        wanted = (wanted_mib - self._spec.memory_mib) * _MIB
        filled: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def heard(event: Event) -> None:
            if isinstance(event, MemorySizeChanged) and event.id == VIRTIO_MEM and event.size >= wanted:
                _set(filled, event.size)

        with self._monitor.listening(heard):
            with _refusal(f"cannot fill {VIRTIO_MEM} up to {wanted_mib} MiB of memory", _MEMORY_REMEDY):
                await self._set_requested(wanted_mib - self._spec.memory_mib)
            if await self.memory_mib() < wanted_mib:
                await self._told(filled, f"cannot add memory up to {wanted_mib} MiB")

    async def _set_requested(self, mib: int) -> None:
        await commands.qom_set(self._monitor, VIRTIO_MEM, "requested-size", mib * _MIB)

    async def _plug_dimm(self, size_mib: int) -> None:
        number = sum(_is_ours(device) for device in await commands.query_memory_devices(self._monitor))
        dimm, backend = f"{_DIMM}{number}", f"{_BACKEND}{number}"
        kind, properties = self._backend(size_mib)
        taken: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def heard(event: Event) -> None:
            if (
                isinstance(event, AcpiDeviceOst)
                and event.info.device == dimm
                and event.info.source in _INSERTIONS
            ):
                _set(taken, event.info.status)

        what = f"cannot add {size_mib} MiB of memory"
        with _refusal(f"{what} ({backend}, {kind})", _MEMORY_REMEDY):
            await commands.object_add(self._monitor, kind, backend, properties)
        with self._monitor.listening(heard):
            try:
                with _refusal(f"{what} ({dimm})", _SLOT_REMEDY):
                    await commands.device_add(self._monitor, "pc-dimm", dimm, {"memdev": backend})
            except HypervisorError:
                await commands.object_del(self._monitor, backend)
                raise
            status = await self._told(taken, what)
        if status:
            raise HotplugRefused(
                f"{what}: the guest refused it (ACPI status {status:#x}); "
                "its kernel needs memory hotplug, or set default_memory to what is needed"
            )

    def _backend(self, size_mib: int) -> tuple[str, dict[str, object]]:
        """Of the kind that the rest of the guest's memory is."""
        properties: dict[str, object] = {"size": size_mib * _MIB, "share": True}
        if self._spec.memory_prealloc:
            properties["prealloc"] = True
        if self._spec.memory_dir is not None:
            return "memory-backend-file", properties | {"mem-path": str(self._spec.memory_dir)}
        return "memory-backend-memfd", properties | ({"hugetlb": True} if self._spec.hugepages else {})

    async def _told(self, answer: asyncio.Future[int], what: str) -> int:
        """The guest's answer. Raises HotplugRefused when there is none."""
        await commands.told(self._monitor, answer, timeout_s=PLUG_TIMEOUT_S)
        if not answer.done():
            raise HotplugRefused(
                f"{what}: the guest did not take it within {PLUG_TIMEOUT_S:g} s; "
                "its kernel needs memory hotplug, or set default_memory to what is needed"
            )
        return answer.result()


@contextmanager
def _refusal(what: str, remedy: str) -> Iterator[None]:
    """QEMU's refusal says what it did not do, and why; whoever reads it also has to know what to do."""
    try:
        yield
    except QmpRefused as err:
        raise HotplugRefused(f"{what}: {err}; {remedy}") from err


def _is_ours(device: commands.MemoryDevice) -> bool:
    return device.type == "dimm" and (device.data.id or "").startswith(_DIMM)


def _set(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)
