"""A machine's life with a QEMU that only speaks QMP: what is told when it fails, and that nothing is left."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisor.console import TAIL_LINES
from hypervisor.errors import BootFailed, InvalidSpec, ProgramNotFound, QmpUnavailable
from hypervisor.process import ProcessExit
from hypervisor.qemu.machine import Machine, booted
from hypervisor.spec import QmpTimeouts, Share, VmSpec

if TYPE_CHECKING:
    from collections.abc import Callable

FAKE_QEMU = Path(__file__).with_name("fake_qemu.py")


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., VmSpec]:
    (tmp_path / "vmlinux").touch()

    def make(behaviour: str, **fields: Any) -> VmSpec:
        qemu = tmp_path / f"qemu-{behaviour}"
        qemu.write_text(f"#!{sys.executable} -IS\n{FAKE_QEMU.read_text()}")
        qemu.chmod(0o755)
        defaults = {
            "name": "sandbox-test",
            "run_dir": tmp_path / "run",
            "qemu_path": qemu,
            "kernel": tmp_path / "vmlinux",
            "vsock": None,
        }
        return VmSpec(**{**defaults, **fields})

    return make


def gone(machine: Machine) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in machine.pids.values())


def daemon(tmp_path: Path, script: str) -> Share:
    path = tmp_path / "virtiofsd"
    path.write_text(f"#!/bin/sh\n# shared-dir\n{script}\n")
    path.chmod(0o755)
    return Share(tag="kataShared", directory=tmp_path, daemon=path)


async def failing(spec: VmSpec) -> BootFailed:
    with pytest.raises(BootFailed) as failed:
        async with booted(spec):
            pytest.fail("it started")
    assert "\n" not in str(failed.value)
    return failed.value


async def test_a_life(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    async with booted(spec("works")) as machine:
        assert machine.pids == {"qemu": machine.pid}
        assert machine.timings["spawned"] < machine.timings["qmp_ready"] <= time.monotonic()
        assert await machine.monitor.query_status() == "running"
        await machine.pause()
        assert await machine.monitor.query_status() == "paused"
        await machine.resume()
        assert await machine.monitor.query_status() == "running"
        assert not machine.exited.done()
        await machine.stop()
        assert machine.exited.result() == ProcessExit(None, 9)
        await machine.stop()
    assert gone(machine)
    assert os.listdir(tmp_path / "run") == ["console.log"]
    assert os.listdir("/proc/self/fd") == before


async def test_leaving_the_block_is_enough(spec: Callable[..., VmSpec]) -> None:
    with pytest.raises(LookupError):
        async with booted(spec("works")) as machine:
            raise LookupError
    assert gone(machine)


async def test_the_run_folder_is_ours_alone(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    async with booted(spec("works")):
        assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "run/qmp.sock").stat().st_mode & 0o777 == 0o600


async def test_leftovers_of_a_crash_are_no_obstacle(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    for name in ("qmp.sock", "fs0.sock", "console.log"):
        (tmp_path / "run" / name).write_text("from before")
    async with booted(spec("works", shares=(daemon(tmp_path, "exec sleep 1000"),))) as machine:
        assert await machine.monitor.query_status() == "running"
    assert (tmp_path / "run/console.log").read_text() == ""


@pytest.mark.parametrize("taken", ["console.log", "qmp.sock"])
async def test_run_folder_that_cannot_be_filled(
    spec: Callable[..., VmSpec], tmp_path: Path, taken: str
) -> None:
    (tmp_path / "run" / taken / "folder").mkdir(parents=True)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(IsADirectoryError) as failed:  # which keeps alive what its frames have
        async with booted(spec("works")):
            pytest.fail("it started")
    assert os.listdir("/proc/self/fd") == before
    assert taken in str(failed.value)


async def test_progress_is_what_the_console_says(spec: Callable[..., VmSpec]) -> None:
    async with booted(spec("works")) as machine:
        assert machine.last_progress() < machine.timings["spawned"]
    async with booted(spec("floods")) as machine:
        async with asyncio.timeout(10):
            while machine.console_tail()[-1:] != ["end"]:
                await asyncio.sleep(0.005)
        assert machine.timings["spawned"] < machine.last_progress() <= time.monotonic()


async def test_qemu_that_refuses_its_arguments(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    began = time.monotonic()
    error = await failing(spec("fails"))
    assert time.monotonic() - began < 1
    assert str(error) == (
        "the virtual machine did not start: QEMU ended with exit status 1: "
        "Use -machine help to list supported machines; "
        "the guest's last words are in containerd's log, with debugging QEMU's arguments too"
    )
    assert error.exit == ProcessExit(1, None)
    assert error.stderr_tail[0] == "qemu-system: -machine nonsense: unsupported machine type"
    assert os.listdir(tmp_path / "run") == ["console.log"]


async def test_qemu_that_crashes(spec: Callable[..., VmSpec]) -> None:
    error = await failing(spec("crashes"))
    assert "QEMU was killed by SIGSEGV" in str(error)


async def test_a_guest_that_panics_before_the_handshake(spec: Callable[..., VmSpec]) -> None:
    error = await failing(spec("panics"))
    assert "QEMU ended with exit status 0: [    1.1] Kernel panic - not syncing: no init" in str(error)
    assert error.console_tail[0] == "[    1.0] Run /init as init process"


async def test_the_kernels_farewell_is_not_the_reason(spec: Callable[..., VmSpec]) -> None:
    error = await failing(spec("gives up"))
    assert "QEMU ended with exit status 0: guest image: cannot mount; " in str(error)


async def test_a_monitor_that_never_answers(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    patience = QmpTimeouts(read_timeout_s=0.1, connect_timeout_s=0.3)
    error = await failing(spec("deaf", qmp=patience))
    assert f"QEMU's monitor at {tmp_path}/run/qmp.sock gave no handshake within 0.3 s" in str(error)
    assert error.exit is None


async def test_a_monitor_that_needs_three_attempts(spec: Callable[..., VmSpec]) -> None:
    async with booted(spec("late")) as machine:
        assert await machine.monitor.query_status() == "running"


async def test_qemu_that_ends_later(spec: Callable[..., VmSpec]) -> None:
    async with booted(spec("leaves")) as machine:
        with pytest.raises(QmpUnavailable, match="is gone, cannot stop"):
            await machine.pause()
        assert await machine.exited == ProcessExit(3, None)
        error = machine.failure("the agent did not answer")
    assert str(error).startswith(
        "the agent did not answer: QEMU ended with exit status 3: qemu-system: something broke; "
    )


async def test_failure_of_a_guest_that_still_runs(spec: Callable[..., VmSpec]) -> None:
    async with booted(spec("works")) as machine:
        error = machine.failure("the agent did not answer", "no progress for 60 s")
    assert str(error).startswith("the agent did not answer: no progress for 60 s; ")
    assert error.exit is None


async def test_a_console_that_floods(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    async with booted(spec("floods")) as machine:
        async with asyncio.timeout(10):
            while machine.console_tail()[-1:] != ["end"]:
                await asyncio.sleep(0.005)
        assert len(machine.console_tail()) == TAIL_LINES
    assert sum(file.stat().st_size for file in (tmp_path / "run").iterdir()) <= 1 << 20


@pytest.mark.parametrize("key", ["kernel", "initrd", "image", "image_initrd"])
async def test_missing_files_are_named(spec: Callable[..., VmSpec], tmp_path: Path, key: str) -> None:
    error = await failing(spec("works", **{key: tmp_path / "nowhere"}))
    assert f"there is no {key} at {tmp_path}/nowhere" in str(error)
    assert not (tmp_path / "run").exists()


async def test_missing_qemu(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    with pytest.raises(ProgramNotFound, match="cannot start /nowhere/qemu: No such file"):
        async with booted(spec("works", qemu_path=Path("/nowhere/qemu"))):
            pass
    assert os.listdir(tmp_path / "run") == ["console.log"]


async def test_a_value_that_cannot_be_an_argument(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    share = daemon(tmp_path, "exec sleep 1000")
    with pytest.raises(InvalidSpec, match="line break"):
        async with booted(spec("works", name="two\nlines", shares=(share,))):
            pass
    assert os.listdir(tmp_path / "run") == ["console.log"]


async def test_helpers_are_part_of_the_machine(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    share = daemon(tmp_path, "exec sleep 1000")
    async with booted(spec("works", shares=(share, share))) as machine:
        assert list(machine.pids) == ["qemu", "virtiofsd", "virtiofsd1"]
        assert all(Path(f"/proc/{pid}").exists() for pid in machine.pids.values())
    assert gone(machine)


async def test_a_helper_that_dies_takes_the_machine_with_it(
    spec: Callable[..., VmSpec], tmp_path: Path
) -> None:
    share = daemon(tmp_path, "echo cannot open the directory >&2; exit 2")
    async with booted(spec("works", shares=(share,))) as machine:
        assert await machine.exited == ProcessExit(None, 9)
        error = machine.failure("the agent did not answer")
    assert "virtiofsd ended with exit status 2: cannot open the directory" in str(error)


async def test_a_helper_that_cannot_start_is_the_reason(spec: Callable[..., VmSpec], tmp_path: Path) -> None:
    """QEMU, whose connection to the helper breaks, ends too and would blame the connection."""
    share = daemon(tmp_path, "echo cannot open the directory >&2; exit 2")
    error = await failing(spec("deaf", shares=(share,), qmp=QmpTimeouts(connect_timeout_s=10)))
    assert "virtiofsd ended with exit status 2: cannot open the directory" in str(error)


async def test_being_cancelled_while_starting_leaves_nothing(
    spec: Callable[..., VmSpec], tmp_path: Path
) -> None:
    async def start() -> None:
        async with booted(spec("deaf", shares=(daemon(tmp_path, "exec sleep 1000"),))):
            pytest.fail("it started")

    before = os.listdir("/proc/self/fd")
    task = asyncio.create_task(start())
    async with asyncio.timeout(10):
        while not (tmp_path / "run/qmp.sock").exists():
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert os.listdir(tmp_path / "run") == ["console.log"]
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("kept", [False, True])
async def test_a_guest_that_shuts_down_is_the_end_also_where_qemu_would_wait(
    spec: Callable[..., VmSpec], tmp_path: Path, kept: bool
) -> None:
    """The fake QEMU waits always; a real one does so when memory shall be saved."""
    async with booted(spec("shuts", dump_dir=tmp_path / "crash" if kept else None)) as machine:
        if kept:
            assert await asyncio.wait_for(asyncio.shield(machine.exited), 5) == ProcessExit(None, 9)
        else:
            assert await machine.monitor.query_status() == "running"
    assert not (tmp_path / "crash").exists()
