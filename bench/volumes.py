"""How fast a container reads and writes its volumes, beside the same guest by hand.

A directory of the host through virtiofs: one large file, and many empty ones. A block device of the host as a virtio
disk. virtiofsd and the disk have the same arguments in both guests, the directories are on the same file system of the
host, and so are the images behind the disks.
"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

from bench.cables import cables
from bench.errors import BenchError
from bench.hand_guest import DISK, SHARED, hand_guest
from bench.lab import KATA_PY, checked
from bench.rows import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from bench.lab import Lab

RUNS_PER_VALUE = 3
FILES = 1000
# Large enough that the start of `dd` does not count. What is read and written goes over virtiofs faster than to a disk.
_MIB, _DISK_MIB = 512, 128
_VOLUME = "/volume"
# The guest by hand has its programs in memory. A container's are read from the host at each start, which would count.
_PROGRAMS = "/run/bin"
_INSTALL = (
    f"mkdir {_PROGRAMS} && cp $(which busybox) {_PROGRAMS} && {_PROGRAMS}/busybox --install -s {_PROGRAMS}"
)
_BY_HAND = "guest by hand"
_WRITE, _READ = "one file, written and synced", "one file, read"
_CREATE, _STAT, _UNLINK = "files made", "files looked at", "files removed"
_DISK_WRITE, _DISK_READ = "disk, written and synced", "disk, read"
_UNITS = {
    _WRITE: "MB/s",
    _READ: "MB/s",
    _CREATE: "1/s",
    _STAT: "1/s",
    _UNLINK: "1/s",
    _DISK_WRITE: "MB/s",
    _DISK_READ: "MB/s",
}
_MB = 1e6
# /proc/uptime counts in hundredths of a second. Opening a file anew drops what the guest has of it (the cache mode
# "auto"), as closing a disk does: what is read comes from the host each time, there out of its memory.
_LARGE = """
read -r begun rest </proc/uptime
dd if=/dev/zero of={file} bs=1M count={mib} conv=fsync{more} 2>&1 || exit
read -r written rest </proc/uptime
dd if={file} of=/dev/null bs=1M 2>&1 || exit
read -r done rest </proc/uptime
echo $begun $written $done
"""
# Only what the shell does by itself, and one program for all files: starting programs would take longer than the rest.
# Where no TZ is set, libc looks for /etc/localtime at each file that `ls` tells the time of; the container's is on
# virtiofs, the other guest's is not, and twice as many questions would be asked there.
_SMALL = """
export TZ=UTC0
mkdir {folder}/small && cd {folder}/small || exit
read -r begun rest </proc/uptime
i=0; while [ $i -lt {files} ]; do : >f$i; i=$((i+1)); done
read -r made rest </proc/uptime
ls -l >/dev/null
read -r seen rest </proc/uptime
rm -r ../small
read -r gone rest </proc/uptime
echo $begun $made $seen $gone
"""


def measure(lab: Lab, runs: int, step: Callable[[str], None]) -> list[Row]:
    """Container and guest by hand in turn; the first of each does not count."""
    folder = lab.folder / "volumes"
    volume = folder / "volume"
    volume.mkdir(parents=True)
    with _loop(folder / "pod.img") as pods, _loop(folder / "hand.img") as hands:
        return asyncio.run(_measure(lab, volume, pods, hands, math.ceil(runs / RUNS_PER_VALUE), step))


async def _measure(
    lab: Lab, volume: Path, pods: str, hands: str, count: int, step: Callable[[str], None]
) -> list[Row]:
    options = ["--mount", f"type=bind,src={volume},dst={_VOLUME},options=rbind:rw", "--device", pods]
    pod: dict[str, list[float]] = {name: [] for name in _UNITS}
    hand: dict[str, list[float]] = {name: [] for name in _UNITS}
    step("starting a container, and a guest by hand")
    with cables() as there, lab.idle_container(KATA_PY, options) as container:
        checked(lab.exec_argv(container, "sh", "-c", _INSTALL))
        async with hand_guest(lab.config, volume.parent / "hand", there, disk=hands) as guest:
            for index in range(count + 1):
                step("warming up" if index == 0 else f"{index} of {count}")
                for script_of, numbers in (
                    (_large, _large_numbers), (_small, _small_numbers), (_disk, _disk_numbers)
                ):  # fmt: skip
                    script = f"PATH={_PROGRAMS}; {script_of(_VOLUME, pods)}"
                    argv = lab.exec_argv(container, "sh", "-c", script)
                    _add(pod, numbers(await asyncio.to_thread(checked, argv)))
                    _add(hand, numbers(await guest.run(script_of(SHARED, DISK))))
    return [
        Row(
            name=name,
            unit=unit,
            values=pod[name][1:],
            to=_BY_HAND,
            base=hand[name][1:],
            aim_least_ratio=0.95 if name == _STAT else None,
        )
        for name, unit in _UNITS.items()
    ]


def _add(found: dict[str, list[float]], numbers: Mapping[str, float]) -> None:
    for name, number in numbers.items():
        found[name].append(number)


def _large(folder: str, disk: str) -> str:
    return _LARGE.format(file=f"{folder}/large", mib=_MIB, more="")


def _small(folder: str, disk: str) -> str:
    return _SMALL.format(folder=folder, files=FILES)


def _disk(folder: str, disk: str) -> str:
    return _LARGE.format(file=disk, mib=_DISK_MIB, more=",notrunc")


def _large_numbers(output: str) -> dict[str, float]:
    return dict(zip((_WRITE, _READ), _speeds(output, _MIB), strict=True))


def _disk_numbers(output: str) -> dict[str, float]:
    return dict(zip((_DISK_WRITE, _DISK_READ), _speeds(output, _DISK_MIB), strict=True))


def _speeds(output: str, mib: int) -> list[float]:
    """MB/s of the two that `dd` has copied. Raises BenchError."""
    size_mb = (mib << 20) / _MB
    return [size_mb / seconds for seconds in _between(output, 3)]


def _small_numbers(output: str) -> dict[str, float]:
    """Files per second. Raises BenchError."""
    return {
        name: FILES / seconds
        for name, seconds in zip((_CREATE, _STAT, _UNLINK), _between(output, 4), strict=True)
    }


def _between(output: str, count: int) -> list[float]:
    """Seconds between the `count` times in the last line. Raises BenchError."""
    try:
        times = [float(word) for word in output.splitlines()[-1].split()]
    except (ValueError, IndexError):
        times = []
    spans = [after - before for before, after in pairwise(times)]
    if len(times) != count or min(spans) <= 0:
        raise BenchError(f"the guest's times are not in: {output.strip()[-500:]}")
    return spans


@contextmanager
def _loop(image: Path) -> Iterator[str]:
    """A block device of the host for the length of the block; all of the image behind it is there already."""
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, _DISK_MIB << 20)
    device = checked(["losetup", "--find", "--show", image]).strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
