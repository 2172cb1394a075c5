"""Real QEMU and virtiofsd. The guest is a few bytes of machine code, so most of this needs no kernel image.

A guest here is an ELF file with the PVH note, which QEMU enters in 32-bit mode without any firmware in between.
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.accel import choose_accel
from hypervisor.console import TAIL_LINES
from hypervisor.errors import BootFailed
from hypervisor.host import Host
from hypervisor.process import ProcessExit
from hypervisor.qemu.machine import booted
from hypervisor.spec import Share, VmSpec

if TYPE_CHECKING:
    from collections.abc import Callable

QEMU = Path(shutil.which("qemu-system-x86_64") or "/nonexistent")
VIRTIOFSD = next(
    (Path(p) for p in ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd") if Path(p).exists()),
    Path("/nonexistent"),
)
ROOT = Path(__file__).parents[2]
GUEST = ROOT / "build" / "guest"
READY_VPORT = 1030

pytestmark = [
    pytest.mark.vm,
    pytest.mark.skipif(not QEMU.exists(), reason="qemu-system-x86_64 is not installed"),
]
needs_virtiofsd = pytest.mark.skipif(not VIRTIOFSD.exists(), reason="virtiofsd is not installed")

LOAD_ADDRESS = 0x100000
# mov dx, 0x3f8; mov esi, text; next: lodsb; test al, al; jz after; out dx, al; jmp next; after:
_PRINT = b"\x66\xba\xf8\x03" + b"\xbe%s" + b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"
_HALT = b"\xfa\xf4\xeb\xfd"  # again: cli; hlt; jmp again
_REPEAT = b"\xeb\xed"  # jmp to the beginning
_RESET = b"\xba\xf9\x0c\x00\x00\xb0\x06\xee" + _HALT  # out 0xcf9, 6


def tiny_kernel(text: bytes, after: bytes = _HALT) -> bytes:
    """A kernel that prints `text` on the serial port and goes on with the code `after`."""
    header_bytes = 64 + 2 * 56
    note = struct.pack("<III4sQ", 4, 8, 18, b"Xen\0", LOAD_ADDRESS)  # 18: XEN_ELFNOTE_PHYS32_ENTRY
    length = len(_PRINT) + 2 + len(after)  # %s becomes four bytes
    code = _PRINT.replace(b"%s", struct.pack("<I", LOAD_ADDRESS + length)) + after + text + b"\0"
    assert code.index(text) == length
    code_offset = header_bytes + len(note)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    elf = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, LOAD_ADDRESS, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack(
        "<IIQQQQQQ", 1, 7, code_offset, LOAD_ADDRESS, LOAD_ADDRESS, len(code), len(code), 0x1000
    )
    notes = struct.pack("<IIQQQQQQ", 4, 4, header_bytes, 0, 0, len(note), len(note), 4)
    return elf + load + notes + note + code


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., VmSpec]:
    (tmp_path / "hello").write_bytes(tiny_kernel(b"hello from the guest\n"))

    def make(code: bytes | None = None, **fields: Any) -> VmSpec:
        if code is not None:
            (tmp_path / "other").write_bytes(code)
        defaults: dict[str, Any] = {
            "name": "sandbox-test",
            "run_dir": tmp_path / "run",
            "qemu_path": QEMU,
            "kernel": tmp_path / ("hello" if code is None else "other"),
            "memory_mib": 64,
            "accel": choose_accel("auto", guest_arch="x86_64").value,
            "vsock": None,
        }
        return VmSpec(**{**defaults, **fields})

    return make


def share(tmp_path: Path) -> Share:
    directory = tmp_path / "shared"
    directory.mkdir(exist_ok=True)
    extra = ("--thread-pool-size=1", "-o", "announce_submounts")
    return Share(tag="kataShared", directory=directory, daemon=VIRTIOFSD, extra_args=extra)


async def console_says(tail: Callable[[], list[str]], text: str) -> None:
    async with asyncio.timeout(15):
        while text not in tail():
            await asyncio.sleep(0.01)


async def test_a_guest_runs_and_ends(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    async with booted(make_spec()) as machine:
        await console_says(machine.console_tail, "hello from the guest")
        assert await machine.monitor.query_status() == "running"
        await machine.pause()
        assert await machine.monitor.query_status() == "paused"
        await machine.resume()
        assert await machine.monitor.query_status() == "running"
        await machine.stop()
        assert machine.exited.result() == ProcessExit(None, 9)
    assert not Path(f"/proc/{machine.pid}").exists()
    assert os.listdir(tmp_path / "run") == ["console.log"]


async def test_qemu_can_be_asked_to_quit(make_spec: Callable[..., VmSpec]) -> None:
    async with booted(make_spec()) as machine:
        await machine.monitor.quit()
        assert await machine.exited == ProcessExit(0, None)


@needs_virtiofsd
async def test_all_devices_together(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    async with booted(make_spec(vsock="user", shares=(share(tmp_path),))) as machine:
        await console_says(machine.console_tail, "hello from the guest")
        assert set(machine.pids) == {"qemu", "virtiofsd"}
    assert not any(Path(f"/proc/{pid}").exists() for pid in machine.pids.values())
    assert os.listdir(tmp_path / "run") == ["console.log"]


async def test_a_guest_that_resets_is_the_end(make_spec: Callable[..., VmSpec]) -> None:
    async with booted(make_spec(tiny_kernel(b"resetting\n", _RESET))) as machine:
        assert await asyncio.wait_for(machine.exited, 15) == ProcessExit(0, None)
        error = machine.failure("the guest did not come up")
    assert str(error).startswith("the guest did not come up: QEMU ended with exit status 0: resetting; ")


async def test_a_guest_that_floods_its_console_does_not_hold_us_up(
    make_spec: Callable[..., VmSpec], tmp_path: Path
) -> None:
    async with booted(make_spec(tiny_kernel(b"flood " * 10 + b"\n", _REPEAT))) as machine:
        async with asyncio.timeout(15):
            while len(machine.console_tail()) < TAIL_LINES:
                await asyncio.sleep(0.01)
        for _ in range(5):
            assert await machine.monitor.query_status() == "running"
        began = time.monotonic()
        await machine.stop()
        assert time.monotonic() - began < 5
    assert len(machine.console_tail()) <= TAIL_LINES + 1  # and the line that was being written
    assert sum(file.stat().st_size for file in (tmp_path / "run").iterdir()) <= 1 << 20


async def test_a_missing_kernel_is_told_at_once(make_spec: Callable[..., VmSpec]) -> None:
    began = time.monotonic()
    with pytest.raises(BootFailed, match="there is no kernel at /nowhere/vmlinux; install the guest image"):
        async with booted(make_spec(kernel=Path("/nowhere/vmlinux"))):
            pass
    assert time.monotonic() - began < 1


async def test_what_is_no_kernel_is_told_in_qemus_words(make_spec: Callable[..., VmSpec]) -> None:
    with pytest.raises(BootFailed) as failed:
        async with booted(make_spec(b"not a kernel at all")):
            pass
    assert failed.value.exit == ProcessExit(1, None)
    assert failed.value.stderr_tail[-1] in str(failed.value)
    assert "\n" not in str(failed.value)


OWNER = """
import asyncio, sys
from pathlib import Path
from hypervisor.qemu.machine import booted
from hypervisor.spec import Share, VmSpec
qemu, kernel, run_dir, directory, daemon, accel = sys.argv[1:]
async def main():
    shares = (Share(tag="kataShared", directory=Path(directory), daemon=Path(daemon)),)
    spec = VmSpec(name="sandbox-owned", run_dir=Path(run_dir), qemu_path=Path(qemu), kernel=Path(kernel),
                  memory_mib=64, accel=accel, vsock="user", shares=shares)
    async with booted(spec) as machine:
        print(*machine.pids.values(), file=sys.stderr, flush=True)
        await machine.exited
asyncio.run(main())
"""


@needs_virtiofsd
def test_nothing_outlives_an_owner_that_is_killed(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    spec = make_spec()
    words = [QEMU, spec.kernel, tmp_path / "run", share(tmp_path).directory, VIRTIOFSD, spec.accel]
    argv = [sys.executable, "-c", OWNER, *map(str, words)]
    with subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as owner:
        try:
            assert owner.stderr is not None
            pids = [int(word) for word in owner.stderr.readline().split()]
            assert len(pids) == 2
            pidfds = [os.pidfd_open(pid) for pid in pids]
            assert not select.select(pidfds, [], [], 0)[0]
        finally:
            owner.kill()
    for pidfd in pidfds:
        assert select.select([pidfd], [], [], 5)[0]
        os.close(pidfd)


@needs_virtiofsd
@pytest.mark.timeout(90)
@pytest.mark.skipif(not (GUEST / "initrd.img").exists(), reason="no guest image in build/guest")
async def test_our_guest_says_that_it_is_ready(make_spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_connection(sock: Any) -> None:
        sock.close()
        ready.set_result(None)

    spec = make_spec(
        kernel=GUEST / "vmlinux",
        initrd=GUEST / "initrd.img",
        memory_mib=256,
        vsock="user",
        shares=(share(tmp_path),),
        tsc_khz=Host().tsc_khz(),
        ready_vport=READY_VPORT,
    )
    async with booted(spec, listeners={READY_VPORT: on_connection}) as machine:
        events: list[asyncio.Future[Any]] = [ready, machine.exited]
        await asyncio.wait(events, timeout=80, return_when=asyncio.FIRST_COMPLETED)
        assert ready.done(), machine.failure("the guest did not come up")
