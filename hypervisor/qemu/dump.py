"""What is kept of a guest that gave up: its memory as an ELF file, and beside it what QEMU was told.

Such a machine is started so that QEMU stops instead of ending (`-no-shutdown`). A guest whose kernel has the driver
for the panic device says so itself; of any other we see that it wants to reset, which a healthy guest never does.
"""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import structlog

from hypervisor.errors import DumpFailed
from hypervisor.qemu import commands
from hypervisor.qemu.events import DumpCompleted, GuestPanicked, Shutdown

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hypervisor.qemu.events import Event
    from hypervisor.qemu.qmp import Monitor
    from hypervisor.spec import VmSpec

log = structlog.get_logger(__name__)

_MIB = 1 << 20
# A disk that is slower than this is not worth waiting for.
_SLOWEST_MIB_PER_S = 10
_LEAST_TIMEOUT_S = 60.0
_FDNAME = "vmcore"


def is_panic(event: Event) -> bool:
    """Whether an event says that the guest's kernel gave up."""
    resets = isinstance(event, Shutdown) and event.guest and event.reason == "guest-reset"
    return resets or isinstance(event, GuestPanicked)


async def guest_memory(monitor: Monitor, spec: VmSpec, argv: Sequence[str], console: Sequence[str]) -> Path:
    """Save the memory of a machine that has stopped; the answer is the file. What was cut short is removed.

    Raises DumpFailed, QmpError, OSError.
    """
    assert spec.dump_dir is not None
    directory = spec.dump_dir
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_space(directory, spec.memory_mib)
    stamp = datetime.now(UTC).strftime("%Y%m%d%H%M%S.%f")[:-3]
    core, state = (directory / f"vmcore-{stamp}.{kind}" for kind in ("elf", "json"))
    told = {"qemu": monitor.version, "arguments": list(argv), "console": list(console)}
    try:
        _write_new(state, json.dumps(told, indent=1).encode())
        await _dump(monitor, core, spec)
    except BaseException:
        for file in (core, state):
            file.unlink(missing_ok=True)
        raise
    return core


def _check_space(directory: Path, memory_mib: int) -> None:
    status = os.statvfs(directory)
    free_mib = status.f_bavail * status.f_frsize // _MIB
    if free_mib < 2 * memory_mib:
        raise DumpFailed(
            f"{directory} has {free_mib} MiB left, and {2 * memory_mib} are asked for, twice the guest's memory; "
            "make room or choose another guest_memory_dump_path"
        )


async def _dump(monitor: Monitor, core: Path, spec: VmSpec) -> None:
    """QEMU gets the open file: where it may not write itself, it still can."""
    outcome: asyncio.Future[DumpCompleted] = asyncio.get_running_loop().create_future()

    def heard(event: Event) -> None:
        if isinstance(event, DumpCompleted) and not outcome.done():
            outcome.set_result(event)

    fd = _new_file(core)
    try:
        await commands.getfd(monitor, _FDNAME, fd)
    finally:
        os.close(fd)
    timeout_s = max(_LEAST_TIMEOUT_S, spec.memory_mib / _SLOWEST_MIB_PER_S)
    with monitor.listening(heard):
        await commands.dump_guest_memory(monitor, _FDNAME, paging=spec.dump_paging)
        lost = await commands.told(monitor, outcome, timeout_s=timeout_s)
    if not outcome.done():
        raise DumpFailed("QEMU went away" if lost else f"it was not done within {timeout_s:g} s")
    if outcome.result().result.status != "completed":
        raise DumpFailed(f"QEMU said: {outcome.result().error}")


def _write_new(path: Path, content: bytes) -> None:
    with open(_new_file(path), "wb") as file:
        file.write(content)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
