"""The floor: which modules its guest loads, found in an initrd as the agent would find it; what it answers."""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import TYPE_CHECKING, cast

import pytest

from bench import floor
from bench.errors import BenchError
from bench.floor import modules
from guest_agent.modules import BOOT
from guest_image.cpio import Tree
from hypervisor.console import Console

if TYPE_CHECKING:
    from pathlib import Path

    from hypervisor.process import Process
    from hypervisor.vsock.base import Vsock as VsockOfHost

LIST = """\
vsock /m/vsock.ko
common /m/common.ko vsock
vmw_vsock_virtio_transport /m/transport.ko common virtio
virtio /m/virtio.ko
virtio_pci /m/pci.ko virtio builtin_one
overlay /m/overlay.ko
"""


def initrd(listed: str) -> bytes:
    tree = Tree()
    tree.file("/a", b"x" * 5)  # needs padding
    tree.file("/usr/lib/kata-py/modules", listed.encode())
    tree.file("/z", b"")
    return tree.to_cpio()


def test_needed_modules_come_first_and_once() -> None:
    assert modules(initrd(LIST), BOOT) == [
        "/m/virtio.ko",
        "/m/pci.ko",
        "/m/vsock.ko",
        "/m/common.ko",
        "/m/transport.ko",
    ]


@pytest.mark.parametrize(
    ("archive", "problem"),
    [
        (initrd("overlay /m/overlay.ko\n"), "built in"),
        (Tree().to_cpio(), "no usr/lib/kata-py/modules"),
        (b"\x28\xb5\x2f\xfd compressed", "compressed"),
    ],
)
def test_what_the_floor_cannot_use_is_told(archive: bytes, problem: str) -> None:
    with pytest.raises(BenchError, match=problem):
        modules(archive, BOOT)


class Qemu:
    """A program that may end."""

    def __init__(self) -> None:
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def output_tail(self) -> list[str]:
        return ["no such device"]


class Vsock:
    """Its connection has said something already."""

    def __init__(self, told: bytes) -> None:
        self._told = told

    async def connect(self, port: int) -> socket.socket:
        assert port == floor.PORT
        ours, guests = socket.socketpair()
        ours.setblocking(False)
        with guests:
            guests.sendall(self._told)
        return ours


def machine(qemu: Qemu, vsock: Vsock, folder: Path) -> floor.Machine:
    console_end, guest_end = socket.socketpair()
    guest_end.close()
    console = Console(console_end, folder / "console.log")
    return floor.Machine(cast("Process", qemu), console, cast("VsockOfHost", vsock), 0.0)


async def test_an_answer_tells_how_long_the_guests_program_ran(tmp_path: Path) -> None:
    answered = machine(Qemu(), Vsock(struct.pack("<4q", 5, 900_000_000, 7, 100_000_000)), tmp_path)
    _, guest_s = await floor._answer(answered)
    answered.console.close()
    assert guest_s == pytest.approx(1.2)


async def test_a_qemu_that_ends_before_the_answer_is_told(tmp_path: Path) -> None:
    qemu = Qemu()
    qemu.exited.set_result(1)
    ended = machine(qemu, Vsock(b""), tmp_path)
    never = asyncio.create_task(asyncio.Event().wait())
    with pytest.raises(BenchError, match="ended with 1: no such device"):
        await floor.unless_ended(ended, never)
    ended.console.close()
    assert never.cancelled()
