"""The control groups of a sandbox on the host: what of it is the pod's, and what is overhead.

With `sandbox_cgroup_only` the shim and all that it starts live in the pod's group. Else only the machine's processors
do, and everything else is in a group of its own, `kata_overhead`, which counts and limits nothing. They move in when
the guest's agent has answered. Up to then they stay in the group that containerd starts shims in: a pod's CPU limit
would make its boot take many times as long. Memory that was taken before stays on that group's account.

The pod's group is the one that the spec names, below what a kubelet makes and limits for the pod. Nobody else uses it,
since the container's processes are in the guest. With systemd's names the groups are found where systemd has them.

Version 1 takes single threads, in those hierarchies where a thread is what is counted: memory is a process's. In
version 2 all threads of a process have to share one group with whatever counts memory, so QEMU goes there as a whole.
Then the pod's memory limit holds for QEMU too, and where that is less than the machine may take the kernel would kill
the machine some time: there it stays with the overhead.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from shim.paths import CGROUP_ROOT as ROOT
from shim.paths import overhead_groups

# Of version 1: hierarchies in which something is counted or limited that a sandbox uses; those that do it by thread.
_HIERARCHIES = ("blkio", "cpu", "cpuacct", "cpuset", "hugetlb", "memory", "pids")
_BY_THREAD = ("cpu", "cpuacct", "cpuset")
# What has to be said before a group of this hierarchy takes processes.
_CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")
# Of version 2, where a group's children have only the controllers that it passes on.
_CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
# Linux's own, where a quota comes without a period.
_PERIOD_US = 100_000


class Limits(NamedTuple):
    """Of the machine's processors: microseconds of CPU time in each period of so many, and the CPUs that they may run
    on. A quota of 0 or less is none, and so is a set without CPUs."""

    quota_us: int = 0
    period_us: int = 0
    cpus: frozenset[int] = frozenset()


def path_of(cgroups_path: str) -> str:
    """The path below each hierarchy's root that an OCI spec's `cgroupsPath` stands for; empty when it names none.

    Raises:
        ValueError: it leads out of the hierarchy.
    """
    if _is_systemds(cgroups_path):
        slice_, prefix, name = cgroups_path.split(":")
        scope = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        cgroups_path = f"{_expanded(slice_)}/{scope}"
    words = [word for word in cgroups_path.split("/") if word not in ("", ".")]
    if ".." in words:
        raise ValueError(f"cgroupsPath {cgroups_path!r} leads out of the control groups")
    return "".join(f"/{word}" for word in words)


def overhead_path(cgroups_path: str, sandbox_id: str) -> str:
    """The group of what a sandbox costs beside the pod with this `cgroupsPath`."""
    plain, systemds = overhead_groups(sandbox_id)
    return systemds if _is_systemds(cgroups_path) else plain


def _is_systemds(cgroups_path: str) -> bool:
    return len(cgroups_path.split(":")) == 3 and not cgroups_path.startswith("/")


def _expanded(slice_: str) -> str:
    """Where systemd has a slice: the name of `a-b.slice` says that it is in `a.slice` (systemd.slice(5))."""
    words = slice_.removesuffix(".slice").split("-") if slice_ != "-.slice" else []
    names = ["-".join(words[: count + 1]) for count in range(len(words))]
    return "/".join(f"{name}.slice" for name in names if name)


class HostCgroup:
    """The groups of one sandbox, `pod` in all hierarchies; with `overhead` the pod's is for processors only. `folders`
    are those that nobody else had made, the inner ones first.

    What changes them may be called from any thread; after `leave` nothing moves any more."""

    def __init__(self, pod: str, overhead: str = "", root: str = ROOT) -> None:
        self._root = root
        self._unified = _is_unified(root)
        hierarchies = _hierarchies(root)
        by_thread = hierarchies if self._unified else _hierarchies(root, _BY_THREAD)
        self._pod = [hierarchy + pod for hierarchy in (by_thread if overhead else hierarchies) if pod]
        self._rest = [hierarchy + overhead for hierarchy in hierarchies] if overhead else self._pod
        groups = [*self._pod, *(self._rest if overhead else ())]
        self.folders = [group for group in groups if not os.path.isdir(group)]
        if overhead:  # the folder that all sandboxes share goes with the last one
            self.folders += [os.path.dirname(group) for group in self._rest]
        self._before: dict[str, str] = {}
        self._held: set[int] = set()
        self._limits = Limits()
        self._lock = threading.Lock()
        self._left = False

    def create_and_join(self, pids: list[int], proc: str = "/proc") -> None:
        """Make the groups where they are missing, and move processes in, this one among them. Raises OSError."""
        with self._lock:
            if self._left:
                return
            self._before = self._before or _memberships(f"{proc}/self/cgroup", self._root)
            for group in dict.fromkeys((*self._pod, *self._rest)):
                _make(group, self._root)
            for group in self._rest:
                for pid in (os.getpid(), *pids):
                    _move(pid, f"{group}/cgroup.procs")

    def hold(self, qemu: int, threads: list[int], limits: Limits) -> None:
        """Keep the machine's processors in the pod's group, and there within these limits. A group that was there
        before has the limits of whoever made it. Raises OSError."""
        with self._lock:
            if self._left:
                return
            for pid in [qemu] if self._unified else threads:
                if pid not in self._held:
                    for group in self._pod:
                        _move(pid, f"{group}/{'cgroup.procs' if self._unified else 'tasks'}")
                    self._held.add(pid)
            if limits != self._limits:
                for group in self._pod:
                    if group in self.folders:
                        _limit(group, limits)
                self._limits = limits

    def memory_limit(self) -> int | None:
        """What the pod's memory limit would be to QEMU: bytes, None without one."""
        limits = []
        for group in self._pod if self._unified else ():
            while group.startswith(f"{self._root}/"):
                with suppress(FileNotFoundError, ValueError):
                    limits.append(int(_read(f"{group}/memory.max")))
                group = os.path.dirname(group)
        return min(limits, default=None)

    def leave(self) -> None:
        """Move this process back, and remove what was made. Harmless when repeated. Raises OSError."""
        with self._lock:
            self._left = True
            for hierarchy, before in self._before.items():
                if not os.path.isdir(before):  # containerd is away, and systemd has removed its group
                    before = hierarchy
                _write(f"{before}/cgroup.procs", str(os.getpid()))
                # What it has started and nobody ends, such as a logger that still writes, goes where it would be.
                for group in self._rest:
                    if group.startswith(f"{hierarchy}/"):
                        for pid in members([group]):
                            _move(pid, f"{before}/cgroup.procs")
            self._before = {}
        remove(self.folders)


def members(folders: list[str]) -> set[int]:
    """The processes in these groups."""
    found: set[int] = set()
    for folder in folders:
        with suppress(OSError):  # it is gone, perhaps at this very moment
            found.update(map(int, _read(f"{folder}/cgroup.procs").split()))
    return found


def empty(folders: list[str], limit_s: float, proc: str = "/proc", root: str = ROOT) -> None:
    """Move what is in these groups to where this process is, and wait for what is just ending, with all of its threads:
    a group whose last process is still on its way out cannot be removed. Raises OSError."""
    deadline = time.monotonic() + limit_s
    own = _memberships(f"{proc}/self/cgroup", root)
    while found := members(folders):
        for folder in folders:
            home = next((group for hierarchy, group in own.items() if folder.startswith(f"{hierarchy}/")), "")
            for pid in members([folder]) if home else ():
                _move(pid, f"{home}/cgroup.procs")
        for pid in found & members(folders):
            _wait_for_end(pid, deadline)
        if time.monotonic() >= deadline:
            return


def _wait_for_end(pid: int, deadline: float) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as err:
        # The second is what Linux 6.12 says of one that is gone while its number is still that of a session.
        if err.errno in (errno.ESRCH, errno.EINVAL):
            return
        raise
    try:
        select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))
    finally:
        os.close(pidfd)


def remove(folders: list[str]) -> None:
    """Remove groups that no process is in any more, and folders of groups that have none. Raises OSError."""
    for folder in folders:
        try:
            os.rmdir(folder)
        except FileNotFoundError:
            continue
        except OSError:
            if not _has_groups(folder):
                # Another sandbox may just have removed the last one. What is still the matter is told.
                with suppress(FileNotFoundError):
                    os.rmdir(folder)


def _has_groups(folder: str) -> bool:
    with suppress(OSError), os.scandir(folder) as entries:
        return any(entry.is_dir(follow_symlinks=False) for entry in entries)
    return False


def _is_unified(root: str) -> bool:
    return os.path.exists(f"{root}/cgroup.controllers")


def _hierarchies(root: str, names: tuple[str, ...] = _HIERARCHIES) -> list[str]:
    if _is_unified(root):
        return [root]
    # Hierarchies of two controllers have a link for each.
    found = dict.fromkeys(os.path.realpath(f"{root}/{name}") for name in names)
    return [folder for folder in found if os.path.exists(f"{folder}/cgroup.procs")]


def _make(group: str, root: str) -> None:
    parent = os.path.dirname(group)
    while group != root and not os.path.isdir(group):
        _make(parent, root)
        try:
            _pass_on_controllers(parent)
            os.mkdir(group)
        except FileExistsError:
            break  # another sandbox was faster: they share parents
        except FileNotFoundError:
            if os.path.isdir(parent):
                raise
            # Another one has just removed the parent.
    for name in _CPUSET_FILES:
        # Of version 1, where a new group has none; version 2's is its parent's when nothing is said.
        file_name = f"{group}/{name}"
        if os.path.exists(file_name) and not _is_unified(group) and not _read(file_name).strip():
            _make(parent, root)
            _write(file_name, _read(f"{parent}/{name}"))


def _pass_on_controllers(parent: str) -> None:
    if os.path.exists(f"{parent}/cgroup.subtree_control"):
        for name in _CONTROLLERS:
            # One that the host lacks, or that whoever made the parent keeps from it, does not count, or limit, here.
            with suppress(OSError):
                _write(f"{parent}/cgroup.subtree_control", f"+{name}")


def _limit(group: str, limits: Limits) -> None:
    """Set what there is to be set in this hierarchy. Raises OSError."""
    quota, period = limits.quota_us, limits.period_us or _PERIOD_US
    cpus = ",".join(map(str, sorted(limits.cpus)))
    if _is_unified(group):
        _write_if_there(f"{group}/cpu.max", f"{quota if quota > 0 else 'max'} {period}")
        _write_if_there(f"{group}/cpuset.cpus", cpus or "\n")
        return
    if os.path.exists(f"{group}/cpu.cfs_quota_us"):
        # Without a quota any period is allowed; with one not every.
        _write(f"{group}/cpu.cfs_quota_us", "-1")
        _write(f"{group}/cpu.cfs_period_us", str(period))
        if quota > 0:
            _write(f"{group}/cpu.cfs_quota_us", str(quota))
    if os.path.exists(f"{group}/cpuset.cpus"):
        _write(f"{group}/cpuset.cpus", cpus or _read(f"{os.path.dirname(group)}/cpuset.cpus"))


def _memberships(file_name: str, root: str) -> dict[str, str]:
    """For each hierarchy the folder of the group that the process is in (cgroups(7), /proc/PID/cgroup)."""
    found = {}
    hierarchies = _hierarchies(root)
    for line in _read(file_name).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers and hierarchies == [root]:
            found[root] = root + path
        for name in controllers.split(","):
            folder = os.path.realpath(f"{root}/{name}")
            if name and folder in hierarchies:
                found[folder] = folder + path
    return found


def _move(pid: int, file_name: str) -> None:
    """Move a process, or a thread, unless it has ended."""
    with suppress(ProcessLookupError):
        _write(file_name, str(pid))


def _read(file_name: str) -> str:
    with open(file_name) as file:
        return file.read()


def _write_if_there(file_name: str, text: str) -> None:
    with suppress(FileNotFoundError):
        _write(file_name, text)


def _write(file_name: str, text: str) -> None:
    fd = os.open(file_name, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
