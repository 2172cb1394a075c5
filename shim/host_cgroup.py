"""The control group of a pod on the host, with `sandbox_cgroup_only`: the shim and all that it starts live there.

They move in when the guest's agent has answered. Up to then they stay in the group that containerd starts shims in: a
pod's CPU limit would make its boot take many times as long. Memory that was taken before stays on that group's
account.

The group is the one that the spec names, below the pod's own, which a kubelet makes and limits. Nobody else uses it,
since the container's processes are in the guest. With systemd's names the groups are found where systemd has them.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from contextlib import suppress

ROOT = "/sys/fs/cgroup"
# Of version 1: hierarchies in which something is counted or limited that a sandbox uses.
_HIERARCHIES = ("blkio", "cpu", "cpuacct", "cpuset", "hugetlb", "memory", "pids")
# What has to be said before a group of this hierarchy takes processes.
_CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")


def path_of(cgroups_path: str) -> str:
    """The path below each hierarchy's root that an OCI spec's `cgroupsPath` stands for; empty when it names none.

    Raises:
        ValueError: it leads out of the hierarchy.
    """
    parts = cgroups_path.split(":")
    if len(parts) == 3 and not cgroups_path.startswith("/"):
        slice_, prefix, name = parts
        scope = name if name.endswith(".slice") else f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
        cgroups_path = f"{_expanded(slice_)}/{scope}"
    words = [word for word in cgroups_path.split("/") if word not in ("", ".")]
    if ".." in words:
        raise ValueError(f"cgroupsPath {cgroups_path!r} leads out of the control groups")
    return "".join(f"/{word}" for word in words)


def _expanded(slice_: str) -> str:
    """Where systemd has a slice: the name of `a-b.slice` says that it is in `a.slice` (systemd.slice(5))."""
    words = slice_.removesuffix(".slice").split("-") if slice_ != "-.slice" else []
    names = ["-".join(words[: count + 1]) for count in range(len(words))]
    return "/".join(f"{name}.slice" for name in names if name)


class HostCgroup:
    """The group at `path` in all hierarchies. `folders` are those of it that nobody else had made."""

    def __init__(self, path: str, root: str = ROOT) -> None:
        self._root = root
        self._groups = [hierarchy + path for hierarchy in _hierarchies(root)]
        self.folders = [group for group in self._groups if not os.path.isdir(group)]
        self._before: dict[str, str] = {}

    def create(self) -> None:
        """Make the group where it is missing. Raises OSError."""
        for group in self.folders:
            _make(group, self._root)

    def join(self, pids: list[int], proc: str = "/proc") -> None:
        """Move processes in, this one among them, and remember where it was. Raises OSError."""
        self._before = self._before or _memberships(f"{proc}/self/cgroup", self._root)
        for group in self._groups:
            for pid in (os.getpid(), *pids):
                with suppress(ProcessLookupError):
                    _write(f"{group}/cgroup.procs", str(pid))

    def leave(self) -> None:
        """Move this process back, and remove what was made. Harmless when repeated. Raises OSError."""
        for group in self._groups:
            hierarchy = next(h for h in _hierarchies(self._root) if group.startswith(h + "/"))
            before = self._before.pop(hierarchy, "")
            if before:
                _write(f"{before}/cgroup.procs", str(os.getpid()))
        remove(self.folders)


def members(folders: list[str]) -> set[int]:
    """The processes in these groups."""
    found: set[int] = set()
    for folder in folders:
        with suppress(FileNotFoundError), open(f"{folder}/cgroup.procs") as file:
            found.update(map(int, file.read().split()))
    return found


def empty(folders: list[str], limit_s: float) -> None:
    """Kill what is in these groups, and wait until it is gone, with all of its threads: a group whose last process is
    still on its way out cannot be removed."""
    deadline = time.monotonic() + limit_s
    while (found := members(folders)) and time.monotonic() < deadline:
        for pid in found:
            try:
                pidfd = os.pidfd_open(pid)
            except OSError as err:
                # The second is what Linux 6.12 says of one that is gone while its number is still that of a session.
                if err.errno in (errno.ESRCH, errno.EINVAL):
                    continue
                raise
            with suppress(ProcessLookupError):
                try:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    left_s = max(0.0, deadline - time.monotonic())
                    select.select([pidfd], [], [], left_s)
                finally:
                    os.close(pidfd)


def remove(folders: list[str]) -> None:
    """Remove groups that no process is in any more. Raises OSError."""
    for folder in folders:
        with suppress(FileNotFoundError):
            os.rmdir(folder)


def _hierarchies(root: str) -> list[str]:
    if os.path.exists(f"{root}/cgroup.controllers"):
        return [root]
    # Hierarchies of two controllers have a link for each.
    found = dict.fromkeys(os.path.realpath(f"{root}/{name}") for name in _HIERARCHIES)
    return [folder for folder in found if os.path.exists(f"{folder}/cgroup.procs")]


def _make(group: str, root: str) -> None:
    if group == root or os.path.isdir(group):
        return
    parent = os.path.dirname(group)
    _make(parent, root)
    os.mkdir(group)
    for name in _CPUSET_FILES:
        # Of version 1, where a new group has none; version 2's is its parent's when nothing is said.
        if os.path.exists(f"{group}/{name}") and not os.path.exists(f"{group}/cgroup.controllers"):
            with open(f"{parent}/{name}") as file:
                _write(f"{group}/{name}", file.read())


def _memberships(file_name: str, root: str) -> dict[str, str]:
    """For each hierarchy the folder of the group that the process is in (cgroups(7), /proc/PID/cgroup)."""
    found = {}
    hierarchies = _hierarchies(root)
    with open(file_name) as file:
        for line in file:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if not controllers and hierarchies == [root]:
                found[root] = root + path
            for name in controllers.split(","):
                folder = os.path.realpath(f"{root}/{name}")
                if name and folder in hierarchies:
                    found[folder] = folder + path
    return found


def _write(file_name: str, text: str) -> None:
    fd = os.open(file_name, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
