"""What idle containers cost the host, by process, and how much of its memory the guest has in use."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.lab import KATA_PY, checked
from bench.rows import Row
from shim import record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from bench.lab import Lab

SHIM_PSS_MB = 32.0
COUNTS = (1, 3)
_BYTES_PER_KB = 1024  # what /proc means by kB


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """One row for each process, kind of memory and number of sandboxes; a value per sandbox.

    `runs` does not matter: this is looked at, not repeated.
    """
    rows: list[Row] = []
    with ExitStack() as running:
        containers: list[str] = []
        for count in COUNTS:
            while len(containers) < count:
                step(f"sandbox {len(containers) + 1} of {COUNTS[-1]}")
                containers.append(running.enter_context(lab.idle_container(KATA_PY)))
            rows += _rows(lab, containers)
    return rows


def _rows(lab: Lab, containers: list[str]) -> list[Row]:
    guests = [_guest_used_mb(lab, container) for container in containers]
    sandboxes = [_processes(container) for container in containers]
    count = f"{len(containers)} running" if len(containers) > 1 else "alone"
    totals = [sum(memory["Pss"] for memory in processes.values()) for processes in sandboxes]
    rows = [Row(name=f"{count}: all processes, PSS", unit="MB", values=totals)]
    for name in sandboxes[0]:
        for kind in ("Pss", "Rss"):
            values = [processes[name][kind] for processes in sandboxes]
            aim = SHIM_PSS_MB if (name, kind) == ("shim", "Pss") else None
            row = Row(
                name=f"{count}: {name}, {kind.upper()}",
                unit="MB",
                values=values,
                to="all processes, PSS",
                base=totals,
                aim_value=aim,
            )
            rows.append(row)
    used = Row(
        name=f"{count}: in use in the guest", unit="MB", values=guests, to="all processes, PSS", base=totals
    )
    return [*rows, used]


def _processes(sandbox: str) -> dict[str, Mapping[str, float]]:
    """MB by process and kind."""
    owner = record.read(sandbox)
    if owner is None:
        raise BenchError(f"the shim of {sandbox} has left no record")
    pids = {"shim": owner.pid, **{name: pid for name, (pid, _) in owner.helpers.items()}}
    return {name: _in_mb(Path(f"/proc/{pid}/smaps_rollup").read_text()) for name, pid in pids.items()}


def _guest_used_mb(lab: Lab, container: str) -> float:
    """What the guest could not give to a program, kernel and initrd's files included."""
    found = _in_mb(checked(lab.exec_argv(container, "cat", "/proc/meminfo")))
    return found["MemTotal"] - found["MemAvailable"]


def _in_mb(text: str) -> Mapping[str, float]:
    """The "Name:  123 kB" lines of a file in /proc."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[1] == "kB":
            found[name] = int(words[0]) * _BYTES_PER_KB / 1e6
    return found
