"""In the place of a control group for containers that are made without root, who may make none."""

from __future__ import annotations

import os

from oci_engine.cgroups.base import kill_each
from oci_engine.errors import SetupFailed
from oci_engine.records import replace
from oci_engine.resources_spec import Resources
from oci_engine.state import is_alive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.plan import CgroupMount
    from oci_engine.state import Status

_WITHOUT = "the container was made without root and has no control group"


class NoCgroup:
    """`status` is the container's, None before it is made."""

    def __init__(self, status: Status | None = None) -> None:
        self.paths: dict[str, str] = {}
        self._status = status

    def create(self) -> None:
        """Nothing."""

    def limit(self, resources: Resources, *, devices: bool = True) -> None:
        """Rules about devices are met anyway: without root none can be made."""
        if replace(resources, devices=()) != Resources():
            raise SetupFailed(f"linux.resources: {_WITHOUT} to limit")

    def add(self, pid: int) -> None:
        """Nothing."""

    def pids(self) -> list[int]:
        """Of the processes in the PID namespace of the first, if it is not the caller's own."""
        if self._status is None:
            return []
        pid = self._status.pid
        try:
            inside = os.stat(f"/proc/{pid}/ns/pid").st_ino
        except OSError:
            return []
        if not is_alive(self._status):  # only now it is certain whose namespace it is
            return []
        if inside == os.stat("/proc/self/ns/pid").st_ino:
            return [pid]
        return [int(name) for name in os.listdir("/proc") if name.isdigit() and _is_in(name, inside)]

    def freeze(self, frozen: bool) -> None:
        raise SetupFailed(f"{_WITHOUT}, and so cannot be {'paused' if frozen else 'resumed'}")

    def is_frozen(self) -> bool:
        return False

    def kill(self) -> None:
        kill_each(self.pids)

    def remove(self) -> None:
        """Nothing."""

    def mounts(self) -> tuple[CgroupMount, ...]:
        return ()

    def stats(self) -> dict[str, object]:
        raise SetupFailed(f"{_WITHOUT}, and so has no statistics")


def _is_in(pid: str, namespace: int) -> bool:
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino == namespace
    except OSError:  # gone, or somebody else's
        return False
