"""What containerd starts for each container: the shim's `start`, `delete` and `-info`, beside the bare interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from bench.errors import BenchError
from bench.lab import SHIM, children, end_descendants
from bench.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from bench.lab import Lab

START_TO_PASS, DELETE_TO_PASS = 2.0, 3.0
# These are short: more of them cost little and steady the median.
ROUNDS_PER_RUN = 3
_BUNDLE = {
    "ociVersion": "1.0.2",
    "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
    "root": {"path": "rootfs"},
    "linux": {},
}


class _Times(NamedTuple):
    """Seconds until stdout was closed by all who had it, and until the process had ended."""

    answered: float
    ended: float


class _Round(NamedTuple):
    """One of each."""

    passed: _Times
    started: _Times
    deleted: _Times
    informed: _Times


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """Each program in turn, in a bundle made by hand and with no containerd around."""
    bundle = lab.folder / "bundle"
    (bundle / "rootfs").mkdir(parents=True)
    (bundle / "config.json").write_text(json.dumps(_BUNDLE))
    rounds = runs * ROUNDS_PER_RUN
    seen = []
    for index in range(rounds + 1):
        step("warming up" if index == 0 else f"round {index} of {rounds}")
        seen.append(_round(lab, bundle))
    return _rows(seen[1:])


def _round(lab: Lab, bundle: Path) -> _Round:
    sandbox = lab.new_id()
    delete = _argv(lab, sandbox, "-bundle", str(bundle), "delete")
    passed = _run(lab, [_interpreter(), "-I", "-S", "-c", "pass"], bundle)
    try:
        with _daemons_ended():
            started = _run(lab, _argv(lab, sandbox, "start"), bundle)
    finally:
        _run(lab, delete, bundle)  # this one has something to clean
    deleted = _run(lab, delete, bundle)
    return _Round(passed, started, deleted, _run(lab, [str(SHIM), "-info"], bundle))


@contextmanager
def _daemons_ended() -> Iterator[None]:
    """Ends at once what the block has left running, so that it disturbs nothing that is measured later."""
    before = set(children(os.getpid()))
    try:
        yield
    finally:
        end_descendants(keep=before)


def _rows(seen: list[_Round]) -> list[Row]:
    base = _ms(times.passed.ended for times in seen)

    def row(name: str, values: Sequence[float], aim: float | None = None) -> Row:
        return Row(name=name, unit="ms", values=values, to="python pass", base=base, aim_ratio=aim)

    return [
        row("python -I -S -c pass", base),
        row(
            "start, until its answer is complete",
            _ms(times.started.answered for times in seen),
            START_TO_PASS,
        ),
        row("start, until it has ended", _ms(times.started.ended for times in seen), START_TO_PASS),
        row("delete with nothing to clean", _ms(times.deleted.ended for times in seen), DELETE_TO_PASS),
        row("-info", _ms(times.informed.ended for times in seen)),
    ]


def _ms(seconds: Iterable[float]) -> list[float]:
    return [value * 1000 for value in seconds]


def _interpreter() -> str:
    """The program that the launcher's first line names."""
    return SHIM.read_text().partition("\n")[0].removeprefix("#!").split()[0]


def _argv(lab: Lab, sandbox: str, *words: str) -> list[str]:
    address = str(lab.server.socket)
    return [str(SHIM), "-namespace", "bench", "-id", sandbox, "-address", address, *words]


def _run(lab: Lab, argv: Sequence[str], bundle: Path) -> _Times:
    """Runs a program as containerd does: in the bundle, with its addresses in the environment. Raises BenchError."""
    environment = {
        "PATH": os.environ.get("PATH", os.defpath),
        "KATA_CONF_FILE": str(lab.config),
        "GRPC_ADDRESS": str(lab.server.socket),
        "TTRPC_ADDRESS": f"{lab.server.socket}.ttrpc",
        "NAMESPACE": "bench",
    }
    began = time.perf_counter()
    with subprocess.Popen(
        argv,
        cwd=bundle,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,  # an interrupt from the terminal is for us, not for a `start` half-way through
    ) as process:
        assert process.stdout is not None
        answer = process.stdout.read()
        answered = time.perf_counter() - began
        status = process.wait()
        ended = time.perf_counter() - began
    if status != 0:
        raise BenchError(f"{' '.join(argv)}: {answer.decode(errors='replace').strip() or f'status {status}'}")
    return _Times(answered, ended)
