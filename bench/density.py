"""Many sandboxes on one host: what the last one's start costs beside the first one's, and what idle ones cost."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.errors import BenchError
from bench.lab import KATA_PY
from bench.rows import Row
from shim import record

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.lab import Lab

SANDBOXES = 20
LAST_TO_FIRST = 1.2
# Starts vary by more than what is looked for: that many at each end are compared.
_AT_EACH_END = 4
# Long enough that one wake-up per second would be seen.
_IDLE_S = 10.0


class _Used(NamedTuple):
    """What a process has used since its start: CPU seconds, and how often it went to sleep."""

    cpu_s: float
    sleeps: int


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """Start to "runs" of one idle container after the other, all of them staying; then the idle shims' use of CPU.

    `runs` does not matter: twenty sandboxes are enough.
    """
    with ExitStack() as running:
        warm_up = lab.idle_container(KATA_PY)
        step("warming up")
        with warm_up:
            pass
        starts, containers = [], []
        for index in range(SANDBOXES):
            step(f"sandbox {index + 1} of {SANDBOXES}")
            began = time.monotonic()
            containers.append(running.enter_context(lab.idle_container(KATA_PY)))
            starts.append(time.monotonic() - began)
        step(f"{SANDBOXES} idle sandboxes for {_IDLE_S:.0f} s")
        cpu, sleeps = _idle(containers)
    first, last = starts[:_AT_EACH_END], starts[-_AT_EACH_END:]
    count = f"{_AT_EACH_END} of {SANDBOXES} sandboxes"
    return [
        Row(name=f"start, first {count}", unit="s", values=first),
        Row(
            name=f"start, last {count}", unit="s", values=last,
            to="first", base=first, aim_ratio=LAST_TO_FIRST,
        ),
        Row(name="idle shim, CPU per second", unit="ms", values=cpu, aim_value=0.0),
        Row(name="idle shim, wake-ups per second", unit="1/s", values=sleeps, aim_value=0.0),
    ]  # fmt: skip


def _idle(containers: list[str]) -> tuple[list[float], list[float]]:
    """Milliseconds of CPU and wake-ups per second of every sandbox's shim, over a time in which nothing happens."""
    pids = [_shim(container) for container in containers]
    before = [_used(pid) for pid in pids]
    time.sleep(_IDLE_S)
    after = [_used(pid) for pid in pids]
    pairs = list(zip(before, after, strict=True))
    return (
        [(new.cpu_s - old.cpu_s) * 1e3 / _IDLE_S for old, new in pairs],
        [(new.sleeps - old.sleeps) / _IDLE_S for old, new in pairs],
    )


def _shim(sandbox: str) -> int:
    owner = record.read(sandbox)
    if owner is None:
        raise BenchError(f"the shim of {sandbox} has left no record")
    return owner.pid


def _used(pid: int) -> _Used:
    # proc(5): utime and stime are fields 14 and 15, counted from the third one here.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    sleeps = 0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        for line in status.read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches:"):
                sleeps += int(line.split()[1])
    return _Used((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), sleeps)
