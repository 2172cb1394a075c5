"""Runs in a process of its own: containers and processes by `runk`, runc, crun and by the engine itself, in turn.

Its standard input is a JSON object: `folder`, `runk` (the program), `rounds`, and `parts` out of `programs`, `engine`.
It prints another one: milliseconds, and kilobytes of memory, by name of runtime and of what was done.

A process of its own for two reasons. crun refuses a host that has controllers in version 2 of control groups beside
those of version 1, so that tree is put out of sight, for this process and what it starts. And the engine forks the
process that calls it, which must be no larger than a program that uses the engine for nothing else.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from oci_engine import linux
from oci_engine.container import Engine
from oci_engine.options import CreateOptions, ExecOptions

if TYPE_CHECKING:
    from collections.abc import Callable

_UNIFIED = "/sys/fs/cgroup/unified"
Values = defaultdict[str, list[float]]


def main() -> None:
    asked = json.load(sys.stdin)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount("", "/", "", linux.MS_PRIVATE | linux.MS_REC)
    if os.path.ismount(_UNIFIED):
        linux.umount(_UNIFIED, linux.MNT_DETACH)
    folder = Path(asked["folder"])
    values: Values = defaultdict(list)
    programs = [_Program(folder, name, path) for name, path in _programs(asked["runk"]).items()]
    engine = _Engine(folder)
    try:
        for program in programs:
            program.begin()
        engine.begin()
        for index in range(asked["rounds"] + 1):
            seen: Values = defaultdict(list)
            if "programs" in asked["parts"]:
                _programs_round(programs, seen)
            if "engine" in asked["parts"]:
                _engine_round(programs, engine, seen)
            if index > 0:  # the first one warms up
                for name, found in seen.items():
                    values[name] += found
    finally:
        for program in programs:
            program.end()
        engine.end()
    json.dump(values, sys.stdout)


def _programs(runk: str) -> dict[str, str]:
    return {"runk": runk, "runc": "runc", "crun": "crun"}


class _Program:
    """A runtime with one container that sleeps, and one that comes and goes."""

    def __init__(self, folder: Path, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self._words = [path, "--root", str(folder / f"state-{name}")]
        self._true, self._sleep = (bundle_of(folder, name, what) for what in ("true", "sleep"))
        self._folder = folder

    def begin(self) -> None:
        self.run("run", "--detach", "--bundle", self._sleep, "sleep")

    def end(self) -> None:
        for container in ("sleep", "true"):
            subprocess.run(
                [*self._words, "delete", "--force", container], check=False, stderr=subprocess.DEVNULL
            )

    def run(self, *words: str) -> None:
        subprocess.run(
            [*self._words, *words], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )

    def create(self, verb: str = "create", *words: str) -> None:
        self.run(verb, *words, "--bundle", self._true, "--pid-file", f"{self._folder}/pid", "true")

    def start(self) -> None:
        self.run("start", "true")

    def wait(self) -> None:
        """Until the container's process has ended."""
        wait_for(int((self._folder / "pid").read_text()))

    def delete(self) -> None:
        self.run("delete", "true")

    def exec(self) -> None:
        self.run("exec", "sleep", "/bin/true")

    def peak_kb(self) -> float:
        """Of the largest of its processes, in a run of the container. Started by a small program: what a process
        has before its exec counts as well."""
        words = [*self._words, "run", "--bundle", self._true, "true"]
        told = self._folder / "peak"
        timed = ["/usr/bin/time", "--format=%M", f"--output={told}", *words]
        subprocess.run(timed, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        return float(told.read_text())


class _Engine:
    """The same by the engine in this process."""

    def __init__(self, folder: Path) -> None:
        self._engine = Engine(str(folder / "state-engine"))
        self._true, self._sleep = (bundle_of(folder, "engine", what) for what in ("true", "sleep"))

    def begin(self) -> None:
        self._engine.create("sleep", self._sleep, CreateOptions())
        self._engine.start("sleep")

    def end(self) -> None:
        for container in ("sleep", "true"):
            self._engine.delete(container, force=True)

    def cycle(self) -> None:
        pid = self._engine.create("true", self._true, CreateOptions())
        self._engine.start("true")
        os.waitpid(pid, 0)
        self._engine.delete("true")

    def exec(self) -> None:
        document: dict[str, object] = {"args": ["/bin/true"], "cwd": "/", "env": ["PATH=/bin"]}
        pid, _ = self._engine.exec("sleep", document, ExecOptions())
        os.waitpid(pid, 0)


def bundle_of(folder: Path, runtime: str, what: str) -> str:
    return str(folder / f"bundle-{runtime}-{what}")


def wait_for(pid: int) -> None:
    """Of a process that is another one's child: it stays a zombie until that one, the bench, looks."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
    except ChildProcessError:
        select.select([pidfd], [], [])
    finally:
        os.close(pidfd)


def _ms(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1000


def _programs_round(programs: list[_Program], seen: Values) -> None:
    python = [_interpreter(programs[0]), "-I", "-S", "-c", "pass"]
    seen["python pass"].append(_ms(lambda: subprocess.run(python, check=True)))
    for each in programs:
        seen[f"{each.name} run"].append(_ms(partial(each.create, "run", "--detach")))
        each.wait()
        seen[f"{each.name} state"].append(_ms(partial(each.run, "state", "true")))
        seen[f"{each.name} delete"].append(_ms(each.delete))
        seen[f"{each.name} create"].append(_ms(each.create))
        seen[f"{each.name} start"].append(_ms(each.start))
        each.wait()
        each.delete()
        seen[f"{each.name} exec"].append(_ms(each.exec))
        seen[f"{each.name} memory"].append(each.peak_kb())


def _interpreter(runk: _Program) -> str:
    """What the launcher's first line names."""
    return Path(runk.path).read_text().partition("\n")[0].removeprefix("#!").split()[0]


def _engine_round(programs: list[_Program], engine: _Engine, seen: Values) -> None:
    seen["engine cycle"].append(_ms(engine.cycle))
    seen["engine exec"].append(_ms(engine.exec))
    for each in programs:
        if each.name != "runk":
            seen[f"{each.name} cycle"].append(_ms(partial(_cycle, each)))
            seen[f"{each.name} one exec"].append(_ms(each.exec))


def _cycle(program: _Program) -> None:
    program.create()
    program.start()
    program.wait()
    program.delete()


if __name__ == "__main__":
    main()
