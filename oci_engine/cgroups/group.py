"""What a container's control group is able to do, whatever the version. For type checks: nothing imports it to run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from oci_engine.plan import CgroupMount
    from oci_engine.resources_spec import Resources


class Cgroup(Protocol):
    """One container's group. `paths` has the host's directories by controller, with one entry "" in version 2."""

    paths: dict[str, str]

    def create(self) -> None:
        """Make it; harmless if it is there."""

    def limit(self, resources: Resources, *, devices: bool = True) -> None:
        """Set what is asked for, leave the rest. Raises SetupFailed."""

    def add(self, pid: int) -> None:
        """Move a process into it."""

    def pids(self) -> list[int]:
        """Of its processes and those of groups below."""

    def freeze(self, frozen: bool) -> None:
        """Returns when it is done."""

    def is_frozen(self) -> bool: ...

    def kill(self) -> None:
        """SIGKILL to every process, frozen ones too."""

    def remove(self) -> None:
        """With all groups below. Raises OSError while a process lives in one."""

    def mounts(self) -> tuple[CgroupMount, ...]:
        """What the container sees of it at a mount of type cgroup."""

    def stats(self) -> dict[str, object]:
        """As the `data` of runc's events have it."""
