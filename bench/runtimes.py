"""Containers on the host itself: `runk` and the engine below it, beside runc and crun. What is run does nothing."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image

from bench import ROOT
from bench.errors import BenchError
from bench.rows import Row
from bench.runtime_rounds import bundle_of
from runk.default_spec import default_spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from bench.lab import Lab

_RUNK = ROOT / "build" / "bin" / "runk"
_BUSYBOX = Path("/bin/busybox")
_WORDS = {"true": ["/bin/true"], "sleep": ["/bin/sleep", "86400"]}
_ENGINE_TO_CRUN, _ENGINE_EXEC_TO_CRUN = 0.5, 0.2
# These are short: more of them cost little and steady the median.
ROUNDS_PER_RUN = 10


def measure_runk(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """The command line: with ten runs, a hundred containers one after the other."""
    values = _measured(lab, runs, step, "programs")
    python = values["python pass"]
    rows = [Row(name="python -I -S -c pass", unit="ms", values=python)]
    for verb, name in (
        ("run", "run --detach true"), ("create", "create"), ("start", "start"), ("state", "state"),
        ("delete", "delete"), ("exec", "exec true"),
    ):  # fmt: skip
        ours = values[f"runk {verb}"]
        bases = {"python pass": python, "runc": values[f"runc {verb}"], "crun": values[f"crun {verb}"]}
        rows += _beside(name, "ms", ours, bases)
    memory = {name: [kb / 1024 for kb in values[f"{name} memory"]] for name in ("runk", "runc", "crun")}
    return [*rows, *_beside("largest process of a run", "MiB", memory.pop("runk"), memory)]


def measure_engine(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """The engine in a process that has it loaded already, as the agent of a guest has."""
    values = _measured(lab, runs, step, "engine")
    rows = []
    for what, base, name, aim in (
        ("cycle", "cycle", "create, start, delete of true", _ENGINE_TO_CRUN),
        ("exec", "one exec", "exec true", _ENGINE_EXEC_TO_CRUN),
    ):
        ours = values[f"engine {what}"]
        rows += _beside(name, "ms", ours, {each: values[f"{each} {base}"] for each in ("crun", "runc")}, aim)
    return rows


def _beside(
    name: str,
    unit: str,
    ours: Sequence[float],
    bases: Mapping[str, Sequence[float]],
    crun_aim: float | None = None,
) -> list[Row]:
    return [
        Row(name=name, unit=unit, values=ours, to=to, base=base, aim_ratio=crun_aim if to == "crun" else None)
        for to, base in bases.items()
    ]


def _measured(lab: Lab, runs: int, step: Callable[[str], None], part: str) -> dict[str, list[float]]:
    folder = lab.folder / f"runtimes-{part}"
    _make_bundles(folder)
    rounds = runs * ROUNDS_PER_RUN
    step(f"{rounds} rounds")
    asked = {"folder": str(folder), "runk": str(_RUNK), "rounds": rounds, "parts": [part]}
    done = subprocess.run(
        [sys.executable, "-m", "bench.runtime_rounds"], input=json.dumps(asked), capture_output=True, text=True,
        check=False, cwd=ROOT,
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchError(done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}")
    values: dict[str, list[float]] = json.loads(done.stdout)
    return values


def _make_bundles(folder: Path) -> None:
    rootfs = folder / "rootfs"
    rootfs.mkdir(parents=True)
    layer = busybox_image.root_layer(_BUSYBOX, busybox_image.applets(_BUSYBOX))
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        archive.extractall(rootfs)
    for runtime in ("runk", "runc", "crun", "engine"):
        for what, words in _WORDS.items():
            document = json.loads(json.dumps(default_spec()))
            document["process"] |= {"terminal": False, "args": words}
            document["root"]["path"] = str(rootfs)
            document["linux"]["cgroupsPath"] = f"/kata-py-bench-{runtime}-{what}"
            bundle = Path(bundle_of(folder, runtime, what))
            bundle.mkdir()
            (bundle / "config.json").write_text(json.dumps(document))
