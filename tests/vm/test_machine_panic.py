"""Guests whose kernel gives up, with a real QEMU: their memory is in a file afterwards, and the machine is gone."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from guest_image.elf import Elf
from hypervisor.process import ProcessExit
from hypervisor.qemu.machine import booted
from tests.vm.test_machine import GUEST, make_spec, pytestmark, tiny_kernel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypervisor.spec import VmSpec

__all__ = ["make_spec", "pytestmark"]

_HALT = b"\xfa\xf4\xeb\xfd"
_RESET = b"\xba\xf9\x0c\x00\x00\xb0\x06\xee" + _HALT  # out 0xcf9, 6


def _set(register: int, value: int) -> bytes:
    """Write a configuration register of PCI device 00:01.0."""
    address = (0x80000800 | register).to_bytes(4, "little")
    return (
        b"\x66\xba\xf8\x0c\xb8" + address + b"\xef"  # mov dx, 0xcf8; mov eax, address; out dx, eax
        b"\x66\xba\xfc\x0c\xb8" + value.to_bytes(4, "little") + b"\xef"  # mov dx, 0xcfc; mov eax, value; out
    )


# The panic device is the first of the machine's: map its register, then write the bit for a panic.
PANIC = _set(0x10, 0xFE000000) + _set(0x04, 2) + b"\xc6\x05\x00\x00\x00\xfe\x01" + _HALT


async def ended(spec: VmSpec) -> tuple[ProcessExit, list[str], str]:
    """How QEMU ended, what was logged, and what is told about it."""
    with capture_logs() as logs:
        async with booted(spec) as machine:
            end = await asyncio.wait_for(asyncio.shield(machine.exited), 60)
            told = str(machine.failure("the guest is gone"))
    return end, [line["event"] for line in logs if line["log_level"] != "debug"], told


@pytest.mark.timeout(90)
@pytest.mark.parametrize("paging", [False, True])
async def test_a_guest_that_tells_of_its_panic(
    make_spec: Callable[..., VmSpec], tmp_path: Path, paging: bool
) -> None:
    kernel = tiny_kernel(b"I give up\n", PANIC)
    end, logs, told = await ended(make_spec(kernel, dump_dir=tmp_path / "crash" / "s1", dump_paging=paging))
    assert end == ProcessExit(None, 9)
    assert logs == ["machine_started", "guest_panicked", "guest_memory_saved"]
    assert told.startswith("the guest is gone: the guest's kernel gave up: I give up; ")
    core, state = sorted((tmp_path / "crash" / "s1").iterdir())
    assert b"I give up\n\0" in core.read_bytes()
    assert json.loads(state.read_bytes())["console"] == ["I give up"]


@pytest.mark.timeout(90)
async def test_a_guest_that_resets(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    end, logs, _ = await ended(make_spec(tiny_kernel(b"again\n", _RESET), dump_dir=tmp_path / "crash"))
    assert end == ProcessExit(None, 9)
    assert logs == ["machine_started", "guest_shut_down", "guest_memory_saved"]


@pytest.mark.timeout(90)
@pytest.mark.skipif(not (GUEST / "vmlinux").exists(), reason="no guest image in build/guest")
async def test_linux_without_a_root_file_system(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    """Its kernel has no driver for the panic device: it resets."""
    fields: dict[str, Any] = {"kernel": GUEST / "vmlinux", "memory_mib": 128}
    end, logs, told = await ended(make_spec(dump_dir=tmp_path / "crash", **fields))
    assert end == ProcessExit(None, 9)
    assert "guest_memory_saved" in logs
    assert "the guest's kernel gave up: " in told
    assert "Kernel panic - not syncing: VFS: Unable to mount root fs" in told
    core = next((tmp_path / "crash").glob("*.elf"))
    Elf(core.read_bytes()[:4096], core.name)
    assert core.stat().st_size > 100 << 20
    assert b"Linux version " in core.read_bytes()


@pytest.mark.timeout(90)
async def test_without_room_it_is_told_and_the_machine_ends_all_the_same(
    make_spec: Callable[..., VmSpec], tmp_path: Path
) -> None:
    (tmp_path / "crash").touch()
    kernel = tiny_kernel(b"I give up\n", PANIC)
    end, logs, told = await ended(make_spec(kernel, dump_dir=tmp_path / "crash"))
    assert end == ProcessExit(None, 9)
    assert logs == ["machine_started", "guest_panicked", "guest_memory_not_saved"]
    assert "the guest's kernel gave up: I give up" in told
    assert os.path.isfile(tmp_path / "crash")


@pytest.mark.timeout(90)
async def test_ending_the_machine_ends_the_saving(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    kernel = tiny_kernel(b"I give up\n", PANIC)
    async with booted(make_spec(kernel, dump_dir=tmp_path / "crash", memory_mib=512)) as machine:
        while not (tmp_path / "crash").exists():
            await asyncio.sleep(0.005)
    assert machine.exited.result() == ProcessExit(None, 9)
    assert {file.suffix for file in (tmp_path / "crash").iterdir()} in (set(), {".elf", ".json"})
