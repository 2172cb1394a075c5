"""What a container gets of the network through its guest, beside the same guest by hand; what a start pays for it.

iperf3 and ping run in both guests in turn, against one server in a namespace that plays the rest of the world. A cable,
traffic control and a tap are on both ways.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bench.cables import TO_HAND, TO_POD, cables
from bench.errors import BenchError
from bench.hand_guest import TOOLS, hand_guest
from bench.lab import KATA_PY, checked, timed
from bench.rows import Row
from bench.timeline import sandbox_up_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.cables import Cables
    from bench.lab import Lab

SPEED_TO_HAND = 0.95
ADDED_MS = 150.0
RUNS_PER_SPEED = 2
# Of each measurement; longer ones do not differ less.
_SECONDS = 2
_PINGS = 4000
# The guest by hand is spoken to by the same network between the measurements, and a container's is not: at first its
# kernel's code is not translated, and the other's address not known.
_PINGS_BEFORE = 500
_BY_HAND = "guest by hand"
_LOADER = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x", re.MULTILINE)
_ROUND_TRIP = re.compile(r"min/avg/max = [\d.]+/([\d.]+)/")
_MBIT, _MS_PER_S = 1e6, 1000
#: What is run: its name, its unit, and the script for an address of the world's.
_OUT, _IN, _TRIP = "TCP out of the guest", "TCP into the guest", "round trip (ping)"


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """Speeds first, then starts; with an interface and without one, in turn."""
    tools = _tools(lab.folder / "tools")
    with cables() as there:
        with _server(there):
            found = asyncio.run(_speeds(lab, there, tools, math.ceil(runs / RUNS_PER_SPEED), step))
        return [*found, *_starts(lab, there, runs, step)]


async def _speeds(lab: Lab, there: Cables, tools: Path, count: int, step: Callable[[str], None]) -> list[Row]:
    options = [
        *("--with-ns", f"network:{there.pod}"),
        *("--mount", f"type=bind,src={tools},dst={TOOLS},options=rbind:ro"),
    ]
    pod: dict[str, list[float]] = {name: [] for name in (_OUT, _IN, _TRIP)}
    hand: dict[str, list[float]] = {name: [] for name in pod}
    step("starting a container, and a guest by hand")
    container = lab.idle_container(KATA_PY, options)
    with container as name:
        async with hand_guest(lab.config, lab.folder / "network", there, tools=tools) as guest:
            for index in range(count + 1):
                for what in pod:
                    step(f"{what}: {'warming up' if index == 0 else f'{index} of {count}'}")
                    argv = lab.exec_argv(name, "sh", "-c", _script(what, TO_POD))
                    pod[what].append(_number(what, await asyncio.to_thread(checked, argv)))
                    hand[what].append(_number(what, await guest.run(_script(what, TO_HAND))))
    return [
        Row(name=_OUT, unit="Mbit/s", values=pod[_OUT][1:], to=_BY_HAND, base=hand[_OUT][1:],
            aim_least_ratio=SPEED_TO_HAND),
        Row(name=_IN, unit="Mbit/s", values=pod[_IN][1:], to=_BY_HAND, base=hand[_IN][1:],
            aim_least_ratio=SPEED_TO_HAND),
        Row(name=_TRIP, unit="ms", values=pod[_TRIP][1:], to=_BY_HAND, base=hand[_TRIP][1:],
            aim_ratio=round(1 / SPEED_TO_HAND, 2)),
    ]  # fmt: skip


def _script(what: str, address: str) -> str:
    if what == _TRIP:
        # Each as soon as the one before has come back: the guest's processor does not go to sleep in between.
        return f"ping -q -A -c {_PINGS_BEFORE} {address} >/dev/null; ping -q -A -c {_PINGS} {address} 2>&1"
    direction = "-R" if what == _IN else ""
    # It maps a file below TMPDIR, which must not be on a shared directory in the one guest and in memory in the other.
    program = f"{TOOLS}/loader --library-path {TOOLS} {TOOLS}/iperf3"
    return f"TMPDIR=/dev/shm {program} -J -t {_SECONDS} {direction} -c {address} 2>&1"


def _number(what: str, output: str) -> float:
    """Mbit/s that have arrived, or milliseconds. Raises BenchError."""
    if what == _TRIP:
        found = _ROUND_TRIP.search(output)
        if found is None:
            raise BenchError(f"ping: {output.strip()[-500:]}")
        return float(found[1])
    try:
        return float(json.loads(output)["end"]["sum_received"]["bits_per_second"]) / _MBIT
    except (ValueError, KeyError) as err:
        raise BenchError(f"iperf3: {output.strip()[-500:]}") from err


def _starts(lab: Lab, there: Cables, count: int, step: Callable[[str], None]) -> list[Row]:
    """Seconds of whole runs, and of the shim's life until the sandbox is up; the first of each does not count."""
    runs: dict[Path, list[float]] = {there.empty: [], there.pod: []}
    ups: dict[Path, list[float]] = {there.empty: [], there.pod: []}
    for index in range(count + 1):
        for namespace in runs:
            step(f"start: {'warming up' if index == 0 else f'{index} of {count}'}")
            offset, container = lab.server.log_size(), lab.new_id()
            options = ["--rm", "--with-ns", f"network:{namespace}"]
            seconds = timed(lab.run_argv(KATA_PY, container, "true", options=options))
            if index > 0:
                runs[namespace].append(seconds)
                ups[namespace].append(sandbox_up_s(container, lab.server.log_since(offset)))
    added = [(more - less) * _MS_PER_S for more, less in zip(ups[there.pod], ups[there.empty], strict=True)]
    to = "no interface"
    return [
        Row(name="ctr run --rm true, one interface", unit="s", values=runs[there.pod], to=to,
            base=runs[there.empty]),
        Row(name="shim to sandbox up, one interface", unit="s", values=ups[there.pod], to=to,
            base=ups[there.empty]),
        Row(name="  added by the interface", unit="ms", values=added, aim_value=ADDED_MS),
    ]  # fmt: skip


@contextmanager
def _server(there: Cables) -> Iterator[None]:
    """iperf3's server in the world, which listens when the block begins."""
    argv = ["ip", "netns", "exec", there.world.name, "iperf3", "--server", "--forceflush"]
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        try:
            said = []
            for line in server.stdout:
                said.append(line)
                if "listening" in line:
                    break
            else:
                raise BenchError(f"iperf3 --server: {''.join(said).strip()}")
            yield
        finally:
            server.kill()


def _tools(folder: Path) -> Path:
    """iperf3 with its libraries in one folder, so that it runs where there are none. Raises BenchError."""
    iperf3 = shutil.which("iperf3")
    if iperf3 is None:
        raise BenchError("the network's speed is measured with iperf3: apt-get install iperf3")
    folder.mkdir()
    shutil.copy(iperf3, folder / "iperf3")
    for library in map(Path, _LOADER.findall(checked(["ldd", iperf3]))):
        shutil.copy(library, folder / ("loader" if library.name.startswith("ld-linux") else library.name))
    return folder
