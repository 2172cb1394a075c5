"""The device files of a container: those that every container has, and those that it asks for."""

from __future__ import annotations

import os
import stat

from oci_engine import inroot, linux
from oci_engine.errors import SetupFailed
from oci_engine.linux_spec import Device
from oci_engine.mounts import clone_tree
from oci_engine.steps import step
from oci_engine.undo import suppress

#: Name, major, minor: the specification's list.
_EVERYWHERE = (
    ("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0),
)  # fmt: skip
_LINKS = {
    "dev/fd": "/proc/self/fd", "dev/stdin": "/proc/self/fd/0", "dev/stdout": "/proc/self/fd/1",
    "dev/stderr": "/proc/self/fd/2", "dev/core": "/proc/kcore",
}  # fmt: skip
DEFAULT_DEVICES = tuple(
    Device(path=f"/dev/{name}", type="c", major=major, minor=minor, mode=0o666, uid=0, gid=0)
    for name, major, minor in _EVERYWHERE
)
_KINDS = {"c": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def with_defaults(wanted: tuple[Device, ...]) -> tuple[Device, ...]:
    """The devices of a specification, and of the default ones those that it does not have itself."""
    paths = {device.path for device in wanted}
    return (*(device for device in DEFAULT_DEVICES if device.path not in paths), *wanted)


def make_device(root: int, device: Device, *, bind: bool) -> None:
    """`bind` shows the host's own device there: in a user namespace nobody may make one."""
    with step(f"device {device.path}"):
        if bind and device.type != "p":
            target = inroot.make_file(root, device.path)
            tree = clone_tree(device.path, recursive=False)
            details = os.fstat(tree)
            if (stat.S_IFMT(details.st_mode), details.st_rdev) != _kind_and_number(device):
                raise SetupFailed(
                    f"device {device.path}: in a user namespace it can only be the host's own, which is not"
                    f" {device.type} {device.major}:{device.minor}"
                )
            linux.move_mount(tree, target)
            os.close(tree)
            os.close(target)
            return
        folder, _, name = device.path.rpartition("/")
        parent = inroot.make_directories(root, folder)
        try:
            _make_node(parent, name, device)
        finally:
            os.close(parent)


def _kind_and_number(device: Device) -> tuple[int, int]:
    return _KINDS[device.type], os.makedev(device.major, device.minor)


def _make_node(parent: int, name: str, device: Device) -> None:
    kind, number = _kind_and_number(device)
    before = os.umask(0)
    try:
        os.mknod(name, kind | device.mode, number, dir_fd=parent)
    except FileExistsError:
        # Mounted there by the specification, or part of the image: only a link would be followed to elsewhere.
        if stat.S_ISLNK(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
            raise
        return
    finally:
        os.umask(before)
    os.chown(name, device.uid, device.gid, dir_fd=parent, follow_symlinks=False)


def make_links(root: int) -> None:
    """The usual names in /dev. What the image has there already stays, but for /dev/ptmx."""
    with step("links in /dev"):
        parent = inroot.make_directories(root, "dev")
        try:
            for path, target in _LINKS.items():
                with suppress(FileExistsError):
                    os.symlink(target, path.removeprefix("dev/"), dir_fd=parent)
            with suppress(FileNotFoundError):
                os.unlink("ptmx", dir_fd=parent)
            os.symlink("pts/ptmx", "ptmx", dir_fd=parent)
        finally:
            os.close(parent)
