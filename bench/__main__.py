"""The command: measures, shows progress on stderr and the result on stdout, writes JSON."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from private_containerd import ContainerdError
from rich.console import Console

from bench import (
    ROOT,
    ctr_run,
    density,
    exec_io,
    guest_exec,
    libraries,
    memory,
    network,
    report,
    root_images,
    runtimes,
    shim_programs,
    stdout_copy,
    volumes,
)
from bench.errors import BenchError
from bench.lab import lab
from config import ConfigError
from hypervisor.errors import HypervisorError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType

    from rich.status import Status

    from bench.lab import Lab
    from bench.rows import Row

    Measure = Callable[[Lab, int, Callable[[str], None]], list[Row]]

PARTS: Mapping[str, Measure] = {
    "floor": ctr_run.measure_floor,
    "run": ctr_run.measure,
    "programs": shim_programs.measure,
    "exec": exec_io.measure,
    "guest": guest_exec.measure,
    "stdout": stdout_copy.measure,
    "runk": runtimes.measure_runk,
    "engine": runtimes.measure_engine,
    "network": network.measure,
    "volumes": volumes.measure,
    "memory": memory.measure,
    "density": density.measure,
    "images": root_images.measure,
    "ttrpc": libraries.measure_ttrpc,
    "vsock": libraries.measure_vsock,
}
FAILURES = (BenchError, ContainerdError, ConfigError, HypervisorError, subprocess.SubprocessError)
# `run` measures the floor too, in turn with the rest; root images take as long as all others together.
BY_DEFAULT = tuple(part for part in PARTS if part not in ("floor", "images"))


def main() -> None:
    options = _options()
    # What the product's own parts would log is not for here; what goes wrong is raised.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        problems = _measure(options.only or BY_DEFAULT, options.runs, options.json)
    except FAILURES as err:
        problems = [str(err)]
    except KeyboardInterrupt:
        problems = ["interrupted; everything it had started is gone"]
    if problems:
        sys.exit("\n".join(f"bench: {problem}" for problem in problems))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Measure kata-py; see docs/performance.md."
    )
    parser.add_argument(
        "--runs", type=int, default=10, metavar="N", help="how often each thing is done (default 10)"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=PARTS,
        metavar="PART",
        help=f"one of {', '.join(PARTS)}; may be repeated",
    )
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "bench.json", metavar="PATH")
    options = parser.parse_args()
    if options.runs < 1:
        parser.error("--runs: want at least 1")
    return options


def _interrupted(number: int, frame: FrameType | None) -> None:
    # Once: what tidies up now must not be interrupted in its turn.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _measure(parts: Sequence[str], runs: int, json_path: Path) -> list[str]:
    """Measures part by part and reports; what went wrong, one line per part that could not be measured."""
    before = report.host()
    progress, output = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 140)
    results: report.Results = {}
    problems = []
    with lab() as place, progress.status("starting") as status:
        for part in parts:
            if not progress.is_terminal:
                progress.print(f"bench: {part}")
            try:
                results[part] = PARTS[part](place, runs, partial(_show, status, part))
            except FAILURES as err:
                problems.append(f"{part}: {err}")
                continue
            output.print(report.table(part, results[part]))
        status.update("tidying up")
    notes = [
        f"load average {before['load']} before, {os.getloadavg()[0]:.2f} after, {before['cpus']} processors"
    ]
    report.write_json(json_path, runs=runs, before=before, results=results, notes=[*notes, *problems])
    output.print(*notes, f"all numbers: {os.path.relpath(json_path)}", sep="\n")
    return problems


def _show(status: Status, part: str, what: str) -> None:
    status.update(f"{part}: {what}")


if __name__ == "__main__":
    main()
