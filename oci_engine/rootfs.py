"""The file system that a container's process sees, from the host's to the pivot. Runs in the new process."""

from __future__ import annotations

import os

from oci_engine import linux
from oci_engine.devices import make_device, make_links
from oci_engine.mount_options import RDONLY
from oci_engine.mountinfo import unescape
from oci_engine.mounts import make_mount, make_readonly, mask
from oci_engine.steps import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.plan import RootPlan

_PROPAGATION = {
    "private": linux.MS_PRIVATE, "slave": linux.MS_SLAVE, "shared": linux.MS_SHARED,
    "unbindable": linux.MS_UNBINDABLE,
}  # fmt: skip


def propagation_flags(name: str) -> int:
    """Of `rootfsPropagation`, for mount(2)."""
    if name in _PROPAGATION:
        return _PROPAGATION[name]
    return _PROPAGATION[name[1:]] | linux.MS_REC


class Rootfs:
    """The steps, in their order: `mount`, `finish`, then `enter`."""

    def __init__(self, plan: RootPlan) -> None:
        self._plan = plan
        self._readonly_later: list[int] = []
        self.fd = -1

    def mount(self) -> None:
        """The root file system as a mount of its own, and all that is mounted below it."""
        plan = self._plan
        with step("propagation of mounts"):
            wanted = propagation_flags(plan.propagation or "rslave")
            if wanted & linux.MS_UNBINDABLE:
                # That too comes after the pivot: until then there is much to be bound.
                wanted = wanted & ~linux.MS_UNBINDABLE | linux.MS_PRIVATE
            # Never shared with the host, from where this namespace is a copy: that comes after the pivot, which a
            # shared mount above the new root would keep from happening.
            if not wanted & linux.MS_REC or wanted & linux.MS_SHARED:
                linux.mount("", "/", "", linux.MS_SLAVE | linux.MS_REC)
            if not wanted & linux.MS_SHARED:
                linux.mount("", "/", "", wanted)
        with step(f"root.path: {plan.path}"):
            below = linux.open_tree(linux.AT_FDCWD, plan.path, linux.OPEN_TREE_CLONE | linux.AT_RECURSIVE)
            target = os.open(plan.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            linux.move_mount(below, target)
            os.close(target)
            self.fd = below
        for each in plan.mounts:
            self._readonly_later += make_mount(self.fd, each, plan.cgroup_mounts, plan.mount_label)
        if self._makes_devices():
            for device in plan.devices:
                make_device(self.fd, device, bind=plan.bind_devices)
            make_links(self.fd)

    def _makes_devices(self) -> bool:
        """Not in a /dev that is the host's."""
        return not any(each.destination == "/dev" and each.options.bind for each in self._plan.mounts)

    def finish(self) -> None:
        """Hide and protect what the specification names. The last that is mounted."""
        for path in self._plan.readonly_paths:
            make_readonly(self.fd, path)
        for path in self._plan.masked_paths:
            mask(self.fd, path)
        for made in self._readonly_later:
            linux.mount_setattr(made, set_=RDONLY)
            os.close(made)
        if self._plan.readonly:
            with step("root.readonly"):
                linux.mount_setattr(self.fd, set_=RDONLY)

    def enter(self) -> None:
        """Make it the root. Afterwards nothing of the host's file system can be reached from here."""
        os.fchdir(self.fd)
        if self._plan.no_pivot:
            with step("moving the root file system to /"):
                self._move()
        else:
            with step("pivot_root"):
                self._pivot()
        if self._plan.propagation:
            with step("linux.rootfsPropagation"):
                linux.mount("", "/", "", propagation_flags(self._plan.propagation))
        os.close(self.fd)
        os.chdir("/")

    def _pivot(self) -> None:
        old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        # Both at one place: no directory has to be made in the container for the old root.
        linux.pivot_root(".", ".")
        os.fchdir(old)
        # The host must not see the unmounting.
        linux.mount("", ".", "", linux.MS_SLAVE | linux.MS_REC)
        linux.umount(".", linux.MNT_DETACH)
        os.close(old)

    def _move(self) -> None:
        """For a host whose root is the initial ramdisk, which cannot be put aside.

        The host's own proc and sysfs, which are still there below, show all that is hidden in the container's.
        """
        here = os.getcwd()
        with open("/proc/self/mountinfo") as file:
            lines = [line.split() for line in file]
        for fields in reversed(lines):
            point, kind = unescape(fields[4]), fields[fields.index("-") + 1]
            if kind in ("proc", "sysfs") and not (point + "/").startswith(here + "/"):
                linux.umount(point, linux.MNT_DETACH)
        linux.mount(here, "/", "", 0x2000)  # MS_MOVE
        os.chroot(".")
        os.chdir("/")


def root_directory() -> int:
    """Open on the root that the process has, for paths in a container that was joined."""
    return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
