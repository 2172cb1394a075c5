"""What a test may leave behind on the host, and proof that it did not.

The test session adopts orphans, so every process that a test causes is a descendant of the session for as long as it
lives. Everything else is recognised by the id, the socket or the folder of the test: other programs may use the host
at the same time.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

RUN_ROOT = Path("/run/kata-py")
SHARED_ROOT = Path("/run/kata-containers/shared/sandboxes")
_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans(*, adopt: bool = True) -> None:
    """Make this process the parent of its descendants' orphans; or end that, and reap those that have ended."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    if not adopt:
        reap()


def state_of(pid: int) -> str:
    """The process's state letter of proc(5); empty when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    return state_of(pid) not in ("", "Z", "X")


def children(pid: int) -> list[int]:
    """Pids of the direct children, zombies included."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, task.read_text().split())
    return found


def descendants(pid: int) -> dict[int, str]:
    """Running processes below `pid`, with their command lines."""
    found: dict[int, str] = {}
    rest = [pid]
    while rest:
        for child in children(rest.pop()):
            rest.append(child)
            with suppress(OSError):  # it has ended meanwhile
                words = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
                # One without words has given its memory back: it ends, though its state may not say so yet.
                if words and is_running(child):
                    found[child] = words.decode(errors="replace").strip()
    return found


def helper(parent: int, name: str) -> int:
    """The one running program below `parent` whose file has this name, with or without an interpreter."""
    found = [
        pid
        for pid, words in descendants(parent).items()
        if any(word.rpartition("/")[2] == name for word in words.split()[:3])
    ]
    assert len(found) == 1, f"{name}: {found}"
    return found[0]


def process_group(leader: int) -> list[int]:
    """Pids of the running members of a process group, whether or not its leader still lives."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                state, _, group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(group) == leader and state not in "ZX":
                    found.append(int(entry.name))
    return found


def open_files(pid: int) -> list[str]:
    """What the process's file descriptors are open on, sorted."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return sorted(found)


def mounts_below(folder: Path) -> list[str]:
    """Mount points of this process's mount namespace in the folder."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(folder)]


async def ended(pid: int) -> None:
    """Wait for the end of a process, and reap it if it is ours. One that is gone already is fine."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    end = asyncio.Event()
    loop.add_reader(pidfd, end.set)
    try:
        await end.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def kill(pids: Iterable[int]) -> None:
    """End processes that a failed test left."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def reap() -> None:
    """Collect adopted orphans that have ended. Only for a moment in which no child of our own is waited for."""
    for pid in children(os.getpid()):
        if state_of(pid) == "Z":
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


class HostWatch:
    """The host before a test; `leftovers` is what the test has added to it since, one line for each thing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes = descendants(os.getpid())
        # Shared by all sandboxes: the last one removes them. Not ours to judge if somebody else's are there.
        shared = (RUN_ROOT, SHARED_ROOT, SHARED_ROOT.parent, SHARED_ROOT.parent.parent)
        self._missing = [path for path in shared if not path.exists()]
        self._ids: set[str] = set()
        self._sockets: set[Path] = set()

    def expect(self, container_id: str, socket: Path) -> None:
        """A sandbox of this id and address is about to be started. An id that is no name leaves nothing."""
        if container_id.strip(".") and "/" not in container_id:
            self._ids.add(container_id)
        self._sockets.add(socket)

    def leftovers(self) -> list[str]:
        """Everything that is left now."""
        running = descendants(os.getpid())
        lines = [f"process {pid}: {words}" for pid, words in running.items() if pid not in self._processes]
        places = self._places()
        lines += [f"path {path}" for path in (*places, *sorted(self._sockets)) if os.path.lexists(path)]
        for folder in (self._folder, *places):
            lines += [f"mount {point}" for point in mounts_below(folder)]
        lines += [
            f"empty folder {path}" for path in self._missing if path.is_dir() and not any(path.iterdir())
        ]
        return lines + [f"control group {path}" for path in self._cgroups()]

    def clear(self) -> None:
        """Remove what a failed test left: its processes first, then its files, unless something is mounted there."""
        kill(pid for pid in descendants(os.getpid()) if pid not in self._processes)
        for place in self._places():
            if not mounts_below(place):
                shutil.rmtree(place, ignore_errors=True)
        for socket in self._sockets:
            socket.unlink(missing_ok=True)
        for folder in self._cgroups():
            folder.rmdir()
            with suppress(OSError):  # others have theirs there
                folder.parent.rmdir()

    def _cgroups(self) -> list[Path]:
        """Of the ids, in any hierarchy: those for overhead, and those that the specifications name."""
        folders = [Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").glob("*/")]
        return [
            folder / parent / name
            for folder in folders
            for parent in ("kata_overhead", "kata-py-tests")
            for name in sorted(self._ids)
            if (folder / parent / name).is_dir()
        ]

    def _places(self) -> list[Path]:
        return [root / name for root in (RUN_ROOT, SHARED_ROOT) for name in sorted(self._ids)]
