"""What a container with a user namespace, or with ids mapped anew, needs the caller to do before the fork."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from oci_engine.errors import SetupFailed, SpecError
from oci_engine.idmap import map_tree, mappings_of, new_user_namespace
from oci_engine.mounts import clone_tree
from oci_engine.planner import CLONE_FLAGS
from oci_engine.records import replace
from oci_engine.spawn import map_text
from oci_engine.steps import reason, step

if TYPE_CHECKING:
    from oci_engine.idmap import Mappings
    from oci_engine.plan import MountStep, RootPlan
    from oci_engine.spec import Mount, Spec
    from oci_engine.undo import Undo
    from oci_engine.waiting import Wait


def check_mappings(spec: Spec, joined: tuple[tuple[int, int], ...], wait: Wait) -> None:
    """Those of a user namespace that is joined cannot be changed: what is asked for has to be what it has."""
    fd = next(fd for fd, kind in joined if kind == CLONE_FLAGS["user"])
    with step("linux.namespaces: user"):
        found = mappings_of(fd, wait)
    wanted = (map_text(spec.linux.uid_mappings), map_text(spec.linux.gid_mappings))
    for name, has, asked in zip(("uidMappings", "gidMappings"), found, wanted, strict=True):
        if sorted(has.splitlines()) != sorted(asked.splitlines()):
            raise SpecError(
                f"linux.{name}",
                f"the user namespace that is joined maps {_one_line(has)}, not {_one_line(asked)}",
            )


def _one_line(maps: str) -> str:
    return ", ".join(maps.splitlines()) or "nothing"


def with_trees(
    root: RootPlan, spec: Spec, joined: tuple[tuple[int, int], ...], files: Undo, wait: Wait
) -> RootPlan:
    """Open the sources of binds that the new process may not, or not as they are to be.

    In a user namespace the folders around them may be closed to its root; and ids are only mapped anew by root itself.
    """
    steps = []
    maps: _Maps | None = None
    for each, mount in zip(root.mounts, spec.mounts, strict=True):
        wanted = root.bind_devices or each.options.idmap
        if wanted and each.options.bind and not each.options.remount:
            try:
                tree = clone_tree(each.source, recursive=each.options.recursive)
            except OSError as err:
                raise SetupFailed(f"{each.place}.source: {each.source}: {err.strerror}") from None
            files.callback(os.close, tree)
            if each.options.idmap:
                maps = maps or _Maps(spec, joined, files, wait)
                maps.apply(tree, each, mount)
            each = replace(each, tree=tree)
        steps.append(each)
    return replace(root, mounts=tuple(steps))


class _Maps:
    """User namespaces for mounts, each made once for the mappings that it has."""

    def __init__(self, spec: Spec, joined: tuple[tuple[int, int], ...], files: Undo, wait: Wait) -> None:
        self._spec = spec
        self._joined = joined
        self._files = files
        self._wait = wait
        self._made: dict[Mappings, int] = {}

    def apply(self, tree: int, plan: MountStep, mount: Mount) -> None:
        recursive = plan.options.idmap == "ridmap"
        map_tree(tree, self._namespace(mount), recursive=recursive, place=plan.place, source=plan.source)

    def _namespace(self, mount: Mount) -> int:
        """By the mount's own mappings, or else the container's."""
        joined = [fd for fd, kind in self._joined if kind == CLONE_FLAGS["user"]]
        if not mount.uid_mappings and joined:
            return joined[0]
        linux = self._spec.linux
        own = (mount.uid_mappings, mount.gid_mappings)
        mappings = own if mount.uid_mappings else (linux.uid_mappings, linux.gid_mappings)
        if mappings not in self._made:
            try:
                fd = new_user_namespace(mappings, self._wait)
            except OSError as err:
                raise SetupFailed(f"{mount.place}.uidMappings: {reason(err)}") from None
            self._files.callback(os.close, fd)
            self._made[mappings] = fd
        return self._made[mappings]
