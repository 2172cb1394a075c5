"""Where this host has its control groups, out of mountinfo and of the process's own groups."""

from __future__ import annotations

from oci_engine.mountinfo import unescape
from oci_engine.records import Record

UNIFIED = "/sys/fs/cgroup"
CONTROLLERS = frozenset(
    {
        "blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "hugetlb", "memory", "misc", "net_cls",
        "net_prio", "perf_event", "pids", "rdma",
    }
)  # fmt: skip


class Hierarchy(Record):
    """A mounted tree of version 1. `own` is the calling process's group in it, as a path below `point`."""

    controllers: tuple[str, ...]
    point: str
    own: str

    @property
    def name(self) -> str:
        """As /proc/PID/cgroup has it."""
        return ",".join(self.controllers)


def is_unified(mountinfo: str) -> bool:
    """Whether the host has version 2 only."""
    return any(kind == "cgroup2" and point == UNIFIED for point, kind, _, _ in _mounts(mountinfo))


def hierarchies(mountinfo: str, own_groups: str) -> list[Hierarchy]:
    """The trees of version 1, each at the first place where it is mounted."""
    own = {}
    for line in own_groups.splitlines():
        _, names, path = line.split(":", 2)
        own[frozenset(names.split(","))] = path
    found: dict[tuple[str, ...], Hierarchy] = {}
    for point, kind, root, options in _mounts(mountinfo):
        if kind != "cgroup":
            continue
        words = options.split(",")
        mounted = tuple(word for word in words if word in CONTROLLERS or word.startswith("name="))
        if not mounted or mounted in found:
            continue
        path = own.get(frozenset(mounted), "/")
        if root != "/":  # a part of the tree is mounted, as in a container
            path = path.removeprefix(root) if path.startswith(root) else "/"
        found[mounted] = Hierarchy(controllers=mounted, point=point, own=path.strip("/"))
    return list(found.values())


def own_unified(own_groups: str) -> str:
    """The process's group of version 2."""
    for line in own_groups.splitlines():
        if line.startswith("0::"):
            return line[3:].strip("/")
    return ""


def _mounts(mountinfo: str) -> list[tuple[str, str, str, str]]:
    """Point, type, root within the file system, and the file system's options, of each mount."""
    found = []
    for line in mountinfo.splitlines():
        fields = line.split()
        dash = fields.index("-", 6)
        kind, options = fields[dash + 1], fields[dash + 3] if len(fields) > dash + 3 else ""
        if kind.startswith("cgroup"):
            found.append((unescape(fields[4]), kind, unescape(fields[3]), options))
    return found
