"""`ctr tasks exec` into a running container: how long a program that does nothing takes, and how fast bytes go.

All of it is done with runc as well, in turn: what `ctr` and containerd cost is in both.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import BenchError
from bench.lab import KATA_PY, LIMIT_S, RUNC, timed
from bench.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.lab import Lab

LATENCIES_PER_RUN = 3
RUNS_PER_TRANSFER = 2
# Large enough that the start of the program does not count, small enough for an emulated guest.
_BYTES = {KATA_PY: 8 << 20, RUNC: 256 << 20}
_BLOCK = 64 << 10
_MB, _GB = 1e6, 1e9


@dataclass(frozen=True)
class _Subject:
    """A runtime with an idle container, the shim behind it, and how many bytes a transfer has."""

    runtime: str
    container: str
    shim_pid: int

    @property
    def size(self) -> int:
        return _BYTES[self.runtime]


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """Latency first, then each direction; kata-py and runc in turn."""
    with ExitStack() as running:
        subjects = []
        for runtime in (KATA_PY, RUNC):
            step(f"starting a container with {runtime}")
            container = running.enter_context(lab.idle_container(runtime))
            subjects.append(_Subject(runtime, container, _shim_pid(lab, container)))
        latency = _latencies(lab, subjects, runs * LATENCIES_PER_RUN, step)
        rows = [
            _row("exec true", "ms", {name: [s * 1000 for s in values] for name, values in latency.items()})
        ]
        program_s = {runtime: statistics.median(values) for runtime, values in latency.items()}
        for name, once in (
            ("stdout to a pipe", _read_all),
            ("stdout to /dev/null", _discard),
            ("stdin from a pipe", _write_all),
        ):
            speeds: dict[str, list[float]] = {KATA_PY: [], RUNC: []}
            shim_cpu: dict[str, list[float]] = {KATA_PY: [], RUNC: []}
            transfers = math.ceil(runs / RUNS_PER_TRANSFER)
            for index in range(transfers):
                step(f"{name}, {index + 1} of {transfers}")
                for subject in subjects:
                    before = _cpu_s(subject.shim_pid)
                    seconds = once(lab, subject.container, subject.size, program_s[subject.runtime])
                    speeds[subject.runtime].append(subject.size / _MB / seconds)
                    cpu_s = _cpu_s(subject.shim_pid) - before
                    shim_cpu[subject.runtime].append(cpu_s / subject.size * _GB)
            rows.append(_row(name, "MB/s", speeds))
            rows.append(_row(f"  {name}: CPU time of the shim", "s/GB", shim_cpu))
    return rows


def _latencies(
    lab: Lab, subjects: Sequence[_Subject], count: int, step: Callable[[str], None]
) -> dict[str, list[float]]:
    """Seconds of `true`, by runtime; the first does not count."""
    found: dict[str, list[float]] = {subject.runtime: [] for subject in subjects}
    for index in range(count + 1):
        step("warming up" if index == 0 else f"exec {index} of {count}")
        for subject in subjects:
            seconds = timed(lab.exec_argv(subject.container, "true"))
            if index > 0:
                found[subject.runtime].append(seconds)
    return found


def _shim_pid(lab: Lab, container: str) -> int:
    """The one of containerd's shims that has the container's id among its arguments."""
    for pid in lab.server.shims():
        if os.fsencode(container) in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            return pid
    raise BenchError(f"no shim of {container} is running")


def _cpu_s(pid: int) -> float:
    """CPU seconds of all threads of a process, in steps of a clock tick (proc(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _row(name: str, unit: str, values: dict[str, list[float]]) -> Row:
    return Row(name=name, unit=unit, values=values[KATA_PY], to="runc", base=values[RUNC])


def _read_all(lab: Lab, container: str, size: int, program_s: float) -> float:
    """Seconds from the first byte to the last."""
    argv = lab.exec_argv(container, *_zeros(size))
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        got = len(os.read(process.stdout.fileno(), _BLOCK))
        first = last = time.perf_counter()
        while data := os.read(process.stdout.fileno(), _BLOCK):
            got += len(data)
            last = time.perf_counter()
        _require_success(process, argv)
    if got != size:
        raise BenchError(f"{got} of {size} bytes came out of the container")
    return last - first


def _discard(lab: Lab, container: str, size: int, program_s: float) -> float:
    """Seconds of the whole without those of a program that does nothing."""
    argv = lab.exec_argv(container, *_zeros(size))
    began = time.perf_counter()
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        _require_success(process, argv)
    return time.perf_counter() - began - program_s


def _write_all(lab: Lab, container: str, size: int, program_s: float) -> float:
    """Seconds of the whole without those of a program that does nothing; the program counts what it gets."""
    argv = lab.exec_argv(container, "wc", "-c")
    block = bytes(_BLOCK)
    began = time.perf_counter()
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        for _ in range(size // _BLOCK):
            process.stdin.write(block)
        process.stdin.close()
        process.stdin = None
        counted = _require_success(process, argv)
    seconds = time.perf_counter() - began - program_s
    if int(counted or 0) != size:
        raise BenchError(f"{counted.decode().strip()} of {size} bytes went into the container")
    return seconds


def _zeros(size: int) -> Sequence[str]:
    return "dd", "if=/dev/zero", f"bs={_BLOCK}", f"count={size // _BLOCK}"


def _require_success(process: subprocess.Popen[bytes], argv: Sequence[str]) -> bytes:
    try:
        out, complaint = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired as err:
        process.kill()
        raise BenchError(f"{' '.join(argv)}: no end after {LIMIT_S:.0f} s") from err
    if process.returncode != 0:
        why = complaint.decode(errors="replace").strip() or f"status {process.returncode}"
        raise BenchError(f"{' '.join(argv)}: {why}")
    return out or b""
