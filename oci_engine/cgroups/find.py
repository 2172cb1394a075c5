"""The control group of a container on this host."""

from __future__ import annotations

import os

from oci_engine.cgroups.mounted import UNIFIED, hierarchies, is_unified, own_unified
from oci_engine.cgroups.v1 import CgroupV1
from oci_engine.cgroups.v2 import CgroupV2
from oci_engine.errors import SetupFailed, SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.cgroups.group import Cgroup
    from oci_engine.state import Status


def find_cgroup(
    cgroups_path: str, container_id: str, *, systemd: bool = False, rootless: bool = False
) -> Cgroup:
    """By the specification's path: one that is absolute begins at the top of the tree.

    A relative one, or the id where there is none, begins at the caller's own group; in version 2 beside it, since
    groups with processes of their own pass no controllers on. With `systemd` it is what names a unit.
    Raises SpecError, SetupFailed where systemd manages no groups.
    """
    if rootless:
        from oci_engine.cgroups.none import NoCgroup

        return NoCgroup()
    with open("/proc/self/mountinfo") as file:
        mountinfo = file.read()
    with open("/proc/self/cgroup") as file:
        own_groups = file.read()
    if systemd:
        if not is_unified(mountinfo):
            raise SetupFailed(
                "--systemd-cgroup: needs a host with version 2 of control groups alone; this one has version 1"
            )
        from oci_engine.cgroups.systemd import SystemdCgroup, unit_of

        return SystemdCgroup(unit_of(cgroups_path, container_id), description=f"container {container_id}")
    path = cgroups_path or container_id
    if path.count(":") == 2 and not path.startswith("/"):
        raise SpecError(
            "linux.cgroupsPath",
            f"{path!r} is systemd's form; give --systemd-cgroup, or a path of directories",
        )
    if is_unified(mountinfo):
        if not path.startswith("/"):
            path = f"{os.path.dirname(own_unified(own_groups))}/{path}"
        return CgroupV2(path, UNIFIED)
    return CgroupV1.below(path, hierarchies(mountinfo, own_groups))


def known_cgroup(status: Status) -> Cgroup:
    """One that exists, by what was recorded of it."""
    paths = status.cgroup_paths
    if not paths:
        from oci_engine.cgroups.none import NoCgroup

        return NoCgroup(status)
    if status.unit:
        from oci_engine.cgroups.systemd import SystemdCgroup, Unit

        return SystemdCgroup(Unit(name=status.unit, slice="", path=""), paths[""])
    if "" in paths:
        return CgroupV2(paths[""], "")
    return CgroupV1(paths, [])


def unit_name(cgroup: Cgroup) -> str:
    """For the record."""
    unit = getattr(cgroup, "unit", None)
    return unit.name if unit is not None else ""
