"""One `ctr run` cut into phases that follow each other: from the shim's log, and from its processes' births and ends.

Only what lies on the way counts: while the guest boots, the shim loads the rest of its code and containerd prepares
the container, and none of that is waited for. Where two such ways meet, the later one decides, so the phases always
add up to the whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from bench.process_events import Life

REST = "containerd and ctr"
_WORD = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)')


@dataclass(frozen=True)
class Run:
    """What was seen from outside: our own times of a `ctr run` and the processes it caused.

    Times are seconds of the monotonic clock. `wall_offset_s` added to one gives the time of day.
    """

    container: str
    began_s: float
    ended_s: float
    containerd_pid: int
    lives: tuple[Life, ...]
    wall_offset_s: float


def phases(run: Run, log: str) -> dict[str, float]:
    """Seconds of each phase, in the order of their first happening; they add up to the time of the run.

    Raises BenchError when the log or the processes do not tell the whole story.
    """
    seconds: dict[str, float] = {}
    now = run.began_s
    for name, moment in _moments(run, log):
        until = min(max(now, moment), run.ended_s)
        seconds[name] = seconds.get(name, 0.0) + until - now
        now = until
    seconds[REST] += run.ended_s - now
    return seconds


def sandbox_up_s(sandbox: str, log: str) -> float:
    """Seconds from the daemon's beginning until the sandbox was up. Raises BenchError."""
    for words in _lines(log):
        if words.get("sandbox") == sandbox and words.get("msg") == "sandbox_up":
            return float(words["sandbox_s"])
    raise BenchError(f"the shim's log does not tell that {sandbox} was up")


def _moments(run: Run, log: str) -> Iterator[tuple[str, float]]:
    """Each phase's name and end, in order; containerd's part comes back between ours."""
    helpers = [life for life in run.lives if life.parent == run.containerd_pid]
    if len(helpers) < 2:
        raise BenchError(f"saw {len(helpers)} of the shim's two helper processes")
    start, delete = helpers[0], helpers[-1]
    daemon = _child(run, start.pid)
    events = _events(log, run)
    qemu_pid = int(events["machine_started"].words["pid"])
    qemu = next((life for life in run.lives if life.pid == qemu_pid), None)
    if qemu is None or delete.exited_s is None:
        raise BenchError("some of the shim's processes were not seen")
    up = events["sandbox_up"]
    daemon_began = up.at_s - up.number("sandbox_s")
    ready = daemon_began + up.number("agent_ready_s")
    yield REST, start.forked_s
    yield "start helper", daemon.forked_s
    yield "shim, until QEMU is started", qemu.forked_s
    yield "QEMU and kernel, to the agent's first line", ready - (up.number("ready_s") - up.number("init_s"))
    yield "agent, to listening", ready
    yield "agent connected", daemon_began + up.number("agent_s")
    yield "sandbox created", up.at_s
    yield REST, events["rpc Create"].began_s
    yield "container created", events["rpc Create"].at_s
    yield REST, events["rpc Start"].began_s
    yield "process started", events["rpc Start"].at_s
    yield "process runs and exits", events["process_exited"].at_s
    yield REST, events["rpc Delete"].began_s
    yield "delete", events["rpc Delete"].at_s
    yield REST, events["rpc Shutdown"].began_s
    yield "shutdown", events["rpc Shutdown"].at_s
    yield REST, delete.forked_s
    yield "delete helper", delete.exited_s


def _child(run: Run, parent: int) -> Life:
    for life in run.lives:
        if life.parent == parent:
            return life
    raise BenchError("the shim's daemon was not seen")


@dataclass(frozen=True)
class _Event:
    """A line of the shim's log; `at_s` is on the monotonic clock."""

    at_s: float
    words: Mapping[str, str]

    def number(self, name: str) -> float:
        try:
            return float(self.words[name])
        except KeyError as err:
            raise BenchError(f"the shim's log line {self.words['msg']!r} has no {name}") from err

    @property
    def began_s(self) -> float:
        return self.at_s - self.number("seconds")


class _Events(dict[str, _Event]):
    def __missing__(self, name: str) -> _Event:
        raise BenchError(f"the shim's log has no line about {name!r}")


def _events(log: str, run: Run) -> _Events:
    """The lines of this run's sandbox by what they tell; calls are named `rpc Create` and so on."""
    found = _Events()
    for words in _lines(log):
        if words.get("sandbox") == run.container and "timestamp" in words:
            at = datetime.fromisoformat(words["timestamp"]).timestamp() - run.wall_offset_s
            name = f"rpc {words.get('rpc')}" if words["msg"] == "rpc_ended" else words["msg"]
            found[name] = _Event(at, words)
    return found


def _lines(log: str) -> Iterable[dict[str, str]]:
    for line in log.splitlines():
        yield {name: value.strip('"') for name, value in _WORD.findall(line)}
