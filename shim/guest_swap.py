"""Swap of a guest, for containers whose annotations ask for it: files of the host, as disks of the guest.

A file has no name and is sparse: it takes what has been swapped out, and is gone with the machine, whatever happens.
Which container gets how much, the limits in the guest say. What a container leaves the next one gets.
"""

from __future__ import annotations

import asyncio
import os
import struct
from typing import TYPE_CHECKING

import structlog

from agent_proto.gen import agent_pb2
from hypervisor.spec import Disk
from shim.errors import InvalidRequest
from shim.oci import SWAP_IN_BYTES, SWAPPINESS

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from agent_proto.gen import oci_pb2
    from config.schema import Qemu
    from hypervisor.qemu.machine import Machine

log = structlog.get_logger()

_MIB = 1 << 20
_PAGE_BYTES = 4096
# A page for the header, and one at least to swap to: less is no swap to the kernel (mm/swapfile.c).
_LEAST_BYTES = 16 * _PAGE_BYTES
_MOST_SWAPPINESS = 100
# union swap_header (linux/swap.h): 1024 bytes that are a boot loader's, version, last page, bad pages; and a mark at
# the page's end.
_HEADER = struct.Struct("=1024xIII")
_MARK = b"SWAPSPACE2"


def wanted(spec: oci_pb2.Spec, qemu: Qemu, what: str) -> int:
    """The bytes of swap that the container `what` is to have, by Kata's rule: none without a swappiness above 0; what
    `swap_in_bytes` has beyond its memory limit, else as much as that, or as the machine without one. Its limit becomes
    `swap_in_bytes`.

    Raises:
        InvalidRequest: an annotation makes no sense.
    """
    memory = spec.Linux.Resources.Memory
    if SWAPPINESS in spec.Annotations:
        memory.Swappiness = _number(spec, SWAPPINESS, what, most=_MOST_SWAPPINESS)
    if SWAP_IN_BYTES in spec.Annotations:
        together = _number(spec, SWAP_IN_BYTES, what, most=2**63 - 1)
        if not 0 < memory.Limit <= together:
            limit = f"has the memory limit {memory.Limit}" if memory.Limit > 0 else "has no memory limit"
            raise InvalidRequest(
                f"{what}: annotation {SWAP_IN_BYTES} is memory and swap together, {together}, and the container {limit}"
                "; give it a limit that is not larger"
            )
        memory.Swap = together
    if memory.Swappiness <= 0:
        return 0
    if memory.Swap:
        return max(0, memory.Swap - memory.Limit)
    return memory.Limit if memory.Limit > 0 else qemu.default_memory * _MIB


class GuestSwap:
    """The swap of one machine. `folder` is where its files are."""

    def __init__(self, machine: Machine, agent: AgentClient, folder: str) -> None:
        self._machine = machine
        self._agent = agent
        self._folder = folder
        self._wanted: dict[str, int] = {}
        self._there_bytes = 0
        self._disks = 0
        self._adding: set[asyncio.Task[None]] = set()

    async def make_room(self, container_id: str, size_bytes: int) -> None:
        """See to it that there is swap for this container beside that of the others.

        Raises:
            HotplugRefused, QmpError: the disk cannot be plugged in.
            RpcError: the guest cannot use it.
            OSError: there is no file for it.
        """
        self._wanted[container_id] = size_bytes
        missing = sum(self._wanted.values()) - self._there_bytes
        if missing > 0:
            size_bytes = max(missing + _PAGE_BYTES, _LEAST_BYTES)
            size_bytes += -size_bytes % _PAGE_BYTES
            self._there_bytes += size_bytes - _PAGE_BYTES  # at once: the next one may come meanwhile
            # To its end, also when nobody waits for it any more: then it is the next one's.
            task = asyncio.create_task(self._add(size_bytes), name=f"add swap for {container_id}")
            self._adding.add(task)
            task.add_done_callback(self._added)
            await asyncio.shield(task)

    def forget(self, container_id: str) -> None:
        """The container is no more. Harmless when repeated."""
        self._wanted.pop(container_id, None)

    def _added(self, task: asyncio.Task[None]) -> None:
        self._adding.discard(task)
        if not task.cancelled() and (err := task.exception()) is not None:
            log.warning("swap_not_added", error=str(err))

    async def _add(self, size_bytes: int) -> None:
        try:
            await self._plug(size_bytes)
        except BaseException:
            self._there_bytes -= size_bytes - _PAGE_BYTES
            raise

    async def _plug(self, size_bytes: int) -> None:
        from tempfile import TemporaryFile

        self._disks += 1
        disk = Disk(id=f"swap{self._disks}", discard=True)
        os.makedirs(self._folder, mode=0o700, exist_ok=True)
        with TemporaryFile(dir=self._folder, buffering=0) as file:
            fd = file.fileno()
            os.ftruncate(fd, size_bytes)
            os.pwrite(fd, _HEADER.pack(1, size_bytes // _PAGE_BYTES - 1, 0), 0)
            os.pwrite(fd, _MARK, _PAGE_BYTES - len(_MARK))
            address = await self._machine.plug_disk(disk, fd)
        try:
            path = [int(slot, 16) for slot in address.address.split("/")]
            await self._agent.add_swap(agent_pb2.AddSwapRequest(PCIPath=path))
        except BaseException:
            await self._machine.unplug_disk(disk.id)
            raise
        log.info("swap_added", disk=disk.id, bytes=size_bytes)


def _number(spec: oci_pb2.Spec, name: str, what: str, *, most: int) -> int:
    text = spec.Annotations[name]
    if not (text.isascii() and text.isdecimal()) or int(text) > most:
        raise InvalidRequest(f"{what}: annotation {name}: want a number of at most {most}, got {text!r}")
    return int(text)
