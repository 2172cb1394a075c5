"""`ctr run` of a program that does nothing: the whole time, its phases, and the floor below it."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import time
from typing import TYPE_CHECKING, NamedTuple

from bench import floor
from bench.lab import KATA_PY, RUNC, reap, timed
from bench.process_events import watched
from bench.rows import Row
from bench.timeline import Run, phases

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.lab import Lab
    from bench.process_events import ProcessEvents
    from hypervisor.spec import VmSpec

TOTAL_TO_FLOOR = 1.9
RUN = "ctr run --rm true"
# How long the shim may need to be gone after `ctr` is.
_SETTLE_S = 10.0


class _Round(NamedTuple):
    """One of each. CPU seconds are of all processes that a start needs, but containerd and its helpers."""

    floor: floor.Floor
    floor_cpu: float
    run: Run
    run_cpu: float
    runc: float


def measure_floor(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """The floor alone."""
    spec = floor.vm_spec(lab.config, lab.folder / "floor")
    found = []
    for index in range(runs):
        step(f"boot {index + 1} of {runs}")
        found.append(asyncio.run(floor.once(spec)))
    return _floor_rows(found)


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """Floor, kata-py and runc in turn, after one run of each that does not count."""
    spec = floor.vm_spec(lab.config, lab.folder / "run-floor")
    offset = lab.server.log_size()
    rounds = []
    with watched(os.getpid(), _containerd(lab)) as events:
        for index in range(runs + 1):
            step("warming up" if index == 0 else f"run {index} of {runs}")
            rounds.append(_round(lab, spec, events))
    return _rows(rounds[1:], lab.server.log_since(offset))


def _round(lab: Lab, spec: VmSpec, events: ProcessEvents) -> _Round:
    before = _cpu_s()
    bare = asyncio.run(floor.once(spec))
    between = _cpu_s()
    run = _kata_py(lab, events)
    after = _cpu_s()
    return _Round(
        bare, between - before, run, after - between, timed(lab.run_argv(RUNC, lab.new_id(), "true"))
    )


def _cpu_s() -> float:
    """CPU seconds of our children that have ended, and of theirs. The shim becomes our child when it is orphaned."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _kata_py(lab: Lab, events: ProcessEvents) -> Run:
    container = lab.new_id()
    argv = lab.run_argv(KATA_PY, container, "true")
    began = time.monotonic()
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as ctr:
        complaint = ctr.communicate()[1]
        ended = time.monotonic()
    if ctr.returncode != 0:
        raise lab.server.error(
            f"{' '.join(argv)}: {complaint.decode().strip() or f'status {ctr.returncode}'}"
        )
    for life in events.born_since(began):
        events.wait_for_exit(life.pid, _SETTLE_S)
    reap()
    lives = tuple(events.born_since(began))
    return Run(container, began, ended, _containerd(lab), lives, time.time() - time.monotonic())


def _containerd(lab: Lab) -> int:
    pid = lab.server.pid()
    if pid is None:
        raise lab.server.error("containerd is gone")
    return pid


def _rows(rounds: list[_Round], log: str) -> list[Row]:
    bare = _floor_rows([each.floor for each in rounds])
    floors = bare[0].values
    totals = [each.run.ended_s - each.run.began_s for each in rounds]
    parts = [phases(each.run, log) for each in rounds]
    rows = [
        Row(name=f"  {name}", unit="s", values=[part[name] for part in parts], to=RUN, base=totals)
        for name in parts[0]
    ]
    added = sum(row.median for row in rows)
    return [
        *bare,
        Row(name=RUN, unit="s", values=totals, to="floor", base=floors, aim_ratio=TOTAL_TO_FLOOR),
        *rows,
        Row(name="  sum of the phases' medians", unit="s", values=[added], to=RUN, base=totals),
        Row(
            name=f"{RUN}, with runc", unit="s", values=[each.runc for each in rounds], to="floor", base=floors
        ),
        Row(
            name="CPU time of shim, QEMU, virtiofsd, ctr",
            unit="s",
            values=[each.run_cpu for each in rounds],
            to="floor's CPU time",
            base=[each.floor_cpu for each in rounds],
        ),
    ]


def _floor_rows(found: list[floor.Floor]) -> list[Row]:
    answered = [each.answered for each in found]
    return [
        Row(name="floor: QEMU until a bare guest answers", unit="s", values=answered),
        Row(
            name="  of it QEMU and kernel, to init",
            unit="s",
            values=[each.init for each in found],
            to="floor",
            base=answered,
        ),
    ]
