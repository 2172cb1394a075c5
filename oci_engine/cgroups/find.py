"""The control group of a container on this host."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from oci_engine.cgroups.mounted import UNIFIED, hierarchies, is_unified, own_unified
from oci_engine.cgroups.v1 import CgroupV1
from oci_engine.cgroups.v2 import CgroupV2

if TYPE_CHECKING:
    from oci_engine.cgroups.base import Cgroup


def find_cgroup(cgroups_path: str, container_id: str) -> Cgroup:
    """By the specification's path: one that is absolute begins at the top of the tree.

    A relative one, or the id where there is none, begins at the caller's own group; in version 2 beside it, since
    groups with processes of their own pass no controllers on.
    """
    with open("/proc/self/mountinfo") as file:
        mountinfo = file.read()
    with open("/proc/self/cgroup") as file:
        own_groups = file.read()
    path = cgroups_path or container_id
    if is_unified(mountinfo):
        if not path.startswith("/"):
            path = f"{os.path.dirname(own_unified(own_groups))}/{path}"
        return CgroupV2(path, UNIFIED)
    return CgroupV1.below(path, hierarchies(mountinfo, own_groups))


def known_cgroup(paths: dict[str, str]) -> Cgroup:
    """One that exists, by the directories that were recorded of it."""
    if "" in paths:
        return CgroupV2(paths[""], "")
    return CgroupV1(paths, [])
