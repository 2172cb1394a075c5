"""Swap of guests: how much containers ask for, and what is made of it."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, cast

import pytest

from agent_proto.gen import oci_pb2
from config.schema import Qemu
from hypervisor.qemu.disk import DiskAddress
from shim.errors import InvalidRequest
from shim.guest_swap import GuestSwap, wanted
from ttrpc import Code, RpcError

if TYPE_CHECKING:
    from pathlib import Path

    from agent_proto.gen import agent_pb2
    from hypervisor.spec import Disk

MIB = 1 << 20
RESOURCE = "io.katacontainers.container.resource."


def spec(limit: int = 0, **annotations: str) -> oci_pb2.Spec:
    made = oci_pb2.Spec(Annotations={RESOURCE + name: value for name, value in annotations.items()})
    made.Linux.Resources.Memory.Limit = limit
    return made


@pytest.mark.parametrize(
    ("asked", "swap", "limit"),
    [
        (spec(), 0, 0),
        (spec(64 * MIB), 0, 0),
        (spec(64 * MIB, swappiness="0", swap_in_bytes=str(100 * MIB)), 0, 100 * MIB),
        (spec(64 * MIB, swap_in_bytes=str(100 * MIB)), 0, 100 * MIB),
        (spec(64 * MIB, swappiness="60", swap_in_bytes=str(100 * MIB)), 36 * MIB, 100 * MIB),
        (spec(64 * MIB, swappiness="60", swap_in_bytes=str(64 * MIB)), 0, 64 * MIB),
        (spec(64 * MIB, swappiness="1"), 64 * MIB, 0),
        (spec(swappiness="100"), 512 * MIB, 0),
    ],
)
def test_how_much(asked: oci_pb2.Spec, swap: int, limit: int) -> None:
    assert wanted(asked, Qemu(default_memory=512), "c") == swap
    assert asked.Linux.Resources.Memory.Swap == limit


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (spec(swappiness="101"), "swappiness: want a number of at most 100, got '101'"),
        (spec(swappiness="-1"), "swappiness: want a number of at most 100, got '-1'"),
        (spec(1, swap_in_bytes="much"), "swap_in_bytes: want a number of at most .*, got 'much'"),
        (spec(1, swap_in_bytes=str(2**63)), "swap_in_bytes: want a number"),
        (
            spec(swap_in_bytes="5"),
            "memory and swap together, 5, and the container has no memory limit; give it",
        ),
        (
            spec(6, swap_in_bytes="5"),
            "memory and swap together, 5, and the container has the memory limit 6; give",
        ),
    ],
)
def test_what_makes_no_sense(asked: oci_pb2.Spec, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^container c: annotation {RESOURCE}.*{message}"):
        wanted(asked, Qemu(), "container c")


class Guest:
    """A machine, and its agent: how many pages of swap it has by the headers of its disks."""

    def __init__(self) -> None:
        self.pages: dict[str, int] = {}
        self.paths: list[list[int]] = []
        self.refuses = False
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.answers.set()

    async def plug_disk(self, disk: Disk, fd: int) -> DiskAddress:
        assert disk.discard
        assert not os.readlink(f"/proc/self/fd/{fd}").endswith(disk.id)
        header = os.pread(fd, 4096, 0)
        assert header.endswith(b"SWAPSPACE2")
        version, last, bad = (int.from_bytes(header[at : at + 4], "little") for at in (1024, 1028, 1032))
        assert (version, (last + 1) * 4096, bad) == (1, os.fstat(fd).st_size, 0)
        self.pages[disk.id] = last
        return DiskAddress("blk", "1e/0a")

    async def unplug_disk(self, disk_id: str) -> None:
        del self.pages[disk_id]

    async def add_swap(self, request: agent_pb2.AddSwapRequest) -> None:
        self.asked.set()
        await self.answers.wait()
        if self.refuses:
            raise RpcError(Code.INVALID_ARGUMENT, "no")
        self.paths.append(list(request.PCIPath))


async def test_swap_grows_with_what_containers_want(tmp_path: Path) -> None:
    guest = Guest()
    swap = GuestSwap(cast("Any", guest), cast("Any", guest), str(tmp_path / "swap"))
    await swap.make_room("a", 4 * MIB)
    assert guest.pages == {"swap1": 1024}
    assert guest.paths == [[0x1E, 0x0A]]
    await swap.make_room("b", 2 * MIB)
    assert guest.pages == {"swap1": 1024, "swap2": 512}
    # What one leaves the next one gets.
    swap.forget("a")
    swap.forget("a")
    await swap.make_room("c", 3 * MIB)
    assert len(guest.pages) == 2
    await swap.make_room("d", 2 * MIB)
    assert guest.pages["swap3"] == 256
    assert os.listdir(tmp_path / "swap") == []


async def test_swap_that_nobody_waits_for_is_the_next_ones(tmp_path: Path) -> None:
    guest = Guest()
    guest.answers.clear()
    swap = GuestSwap(cast("Any", guest), cast("Any", guest), str(tmp_path))
    waiting = asyncio.create_task(swap.make_room("a", 4 * MIB))
    await asyncio.wait_for(guest.asked.wait(), 60)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    swap.forget("a")
    guest.answers.set()
    await swap.make_room("b", 4 * MIB)
    assert guest.pages == {"swap1": 1024}


async def test_swap_that_the_guest_refuses_goes(tmp_path: Path) -> None:
    guest = Guest()
    swap = GuestSwap(cast("Any", guest), cast("Any", guest), str(tmp_path))
    guest.refuses = True
    with pytest.raises(RpcError, match="no"):
        await swap.make_room("a", 4 * MIB)
    assert guest.pages == {}
    guest.refuses = False
    await swap.make_room("a", 4 * MIB)
    assert guest.pages == {"swap2": 1024}
