"""The guest's cgroups: version 2, one group per container below /kata, with the controllers that matter on."""

from __future__ import annotations

import errno
import os
import signal

from guest_agent.errors import StateConflict

ROOT = "/sys/fs/cgroup"
PARENT = "/kata"
#: What limits and statistics of containers need. Each more makes every group more expensive.
CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")

#: How often a signal to a whole group looks for processes that it has missed.
MAX_SIGNAL_ROUNDS = 16


def enable_controllers(root: str = ROOT) -> None:
    """Give the controllers to the groups of containers. One that the kernel refuses does not cost the others."""
    os.makedirs(f"{root}{PARENT}", exist_ok=True)
    for directory in (root, f"{root}{PARENT}"):
        with open(f"{directory}/cgroup.controllers") as file:
            available = file.read().split()
        controllers = [name for name in CONTROLLERS if name in available]
        try:
            _write(f"{directory}/cgroup.subtree_control", " ".join(f"+{name}" for name in controllers))
        except OSError:
            for name in controllers:
                try:
                    _write(f"{directory}/cgroup.subtree_control", f"+{name}")
                except OSError:
                    continue


class Cgroup:
    """One container's group."""

    def __init__(self, container_id: str, root: str = ROOT) -> None:
        self.name = f"{PARENT}/{container_id}"
        self.path = f"{root}{self.name}"

    def read(self, name: str) -> str:
        """A file of the group, empty when the kernel does not have it."""
        return self._read(f"{self.path}/{name}")

    def _read(self, path: str) -> str:
        try:
            with open(path) as file:
                return file.read()
        except (FileNotFoundError, OSError) as err:
            if isinstance(err, FileNotFoundError) or err.errno in (errno.ENODEV, errno.EOPNOTSUPP):
                return ""
            raise

    def flag(self, file: str, key: str) -> int:
        """A number out of a file of "key value" lines; 0 when it is not there."""
        for line in self.read(file).splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
        return 0

    @property
    def populated(self) -> bool:
        """Whether any process lives in the group or below it."""
        return bool(self.flag("cgroup.events", "populated"))

    @property
    def frozen(self) -> bool:
        return bool(self.flag("cgroup.events", "frozen"))

    def kill(self) -> None:
        """SIGKILL to every process of the group, frozen or not, also those that are being forked right now."""
        if not self._control("cgroup.kill", "1"):
            self._signal_each(signal.SIGKILL)

    def pids(self) -> list[int]:
        """Every process of the group and the groups below it, in the guest's pid namespace; none without a group."""
        found: list[int] = []
        for directory, _, _ in os.walk(self.path):
            found += map(int, self._read(f"{directory}/cgroup.procs").split())
        return found

    def signal(self, number: int) -> None:
        """A signal to every process of the group, also those that are being forked right now."""
        if number == signal.SIGKILL:
            self.kill()
        else:
            self._signal_each(number)

    def _signal_each(self, number: int) -> None:
        """A fork either was done when its parent got the signal, and then shows in the next look, or the kernel
        begins it anew after the parent took the signal. So nobody is missed once a look shows nobody new.

        Processes that answer the signal by forking show as new as well; MAX_SIGNAL_ROUNDS ends that.
        """
        signalled: set[int] = set()
        for _ in range(MAX_SIGNAL_ROUNDS):
            fresh = [pid for pid in self.pids() if pid not in signalled]
            if not fresh:
                return
            for pid in fresh:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
            signalled.update(fresh)

    def freeze(self, frozen: bool) -> None:
        """Ask for it; it is done when `frozen` says so. Raises StateConflict when the group is gone."""
        if not self._control("cgroup.freeze", "1" if frozen else "0"):
            raise StateConflict(f"there is no cgroup {self.name}")

    def _control(self, file: str, value: str) -> bool:
        try:
            _write(f"{self.path}/{file}", value)
        except FileNotFoundError:
            return False
        return True

    def remove(self) -> None:
        """Remove the group and groups its processes made below it. Raises OSError (EBUSY) while it is populated."""
        for directory, _, _ in os.walk(self.path, topdown=False):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue


def _write(path: str, value: str) -> None:
    """Not open(path, "w"): that asks for missing files to be made, to which the kernel says EACCES, not ENOENT."""
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
