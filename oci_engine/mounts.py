"""Makes the mounts of a container, in the new process, with the kernel's mount API of 5.2 and later.

Each mount is made detached, gets its attributes, and is then attached to a directory or file that was opened below
the root: no path is looked up twice, so none can change in between.
"""

from __future__ import annotations

import errno
import os
import stat

from oci_engine import inroot, linux
from oci_engine.copy_up import copy_tree
from oci_engine.errors import SetupFailed
from oci_engine.mount_options import NODEV, NOEXEC, NOSUID, RDONLY
from oci_engine.steps import step

TYPE_CHECKING = False
if TYPE_CHECKING:
    from oci_engine.plan import CgroupMount, MountStep

#: fsconfig(2) takes strings of up to 255 bytes.
_FSCONFIG_STRING = 255
#: Files in /proc that may be replaced, as lxcfs does.
_REPLACEABLE = frozenset(
    f"proc/{name}"
    for name in (
        "cpuinfo", "diskstats", "loadavg", "meminfo", "net/dev", "slabinfo", "stat", "swaps", "uptime",
        "sys/kernel/ns_last_pid",
    )
)  # fmt: skip


def make_mount(root: int, mount: MountStep, cgroup_mounts: tuple[CgroupMount, ...], label: str) -> list[int]:
    """Returns mounts that are to become read-only once all is in place (their open files)."""
    with step(f"{mount.place}: mounting {mount.type or mount.source} at {mount.destination}"):
        _check_proc(root, mount)
        if mount.type == "cgroup":
            return _mount_cgroup(root, mount, cgroup_mounts)
        if mount.options.remount:
            return _remount(root, mount)
        if mount.options.bind:
            return _bind(root, mount)
        return _mount_new(root, mount, label)


def _check_proc(root: int, mount: MountStep) -> None:
    """Nothing may stand between the container's processes and the kernel's own /proc and /sys.

    Sysctls, labels and masked paths are written and hidden below them: a link at `/proc` would lead all that elsewhere.
    """
    if mount.options.remount:
        return  # nothing new gets there
    path = mount.destination.lstrip("/")
    if mount.type in ("proc", "sysfs") and not mount.options.bind:
        if inroot.resolve(root, path) != path:
            raise SetupFailed(
                f"{mount.place}: {mount.destination} is a symbolic link in the root file system; {mount.type} is"
                " only mounted on a directory"
            )
        return
    where = inroot.resolve(root, path)
    if where == "proc" and mount.options.bind:
        source = os.open(mount.source, os.O_PATH | os.O_CLOEXEC) if mount.tree < 0 else os.dup(mount.tree)
        try:
            if linux.fs_type(source) == linux.PROC_SUPER_MAGIC and os.fstat(source).st_ino == 1:
                return
        finally:
            os.close(source)
        raise SetupFailed(f"{mount.place}: {mount.source} is not proc and cannot be mounted at /proc")
    if where == "proc" or (where.startswith("proc/") and where not in _REPLACEABLE):
        raise SetupFailed(f"{mount.place}: {mount.destination} is inside /proc, where nothing may be mounted")


def _mount_new(root: int, mount: MountStep, label: str) -> list[int]:
    """A file system of its own."""
    attributes, copy_up = mount.options.attributes, mount.options.copy_up
    # What is mounted below a read-only tmpfs needs its directory made first.
    later = mount.type == "tmpfs" and bool(attributes.set & RDONLY)
    target = inroot.make_directories(root, mount.destination)
    try:
        data = mount.options.data
        if label and mount.type in ("tmpfs", "mqueue", "devpts"):
            data = (*data, f'context="{label}"')
        if mount.type == "tmpfs" and not any(word.startswith("mode=") for word in data):
            # What the image has there decides, as with other runtimes.
            data = (*data, f"mode={stat.S_IMODE(os.stat(target).st_mode):o}")
        now = attributes.without(RDONLY) if later else attributes
        if any(len(os.fsencode(word)) > _FSCONFIG_STRING for word in data):
            linux.mount(mount.source, f"/proc/self/fd/{target}", mount.type, 0, ",".join(data))
            made = inroot.open_path(root, mount.destination)
            if now:
                linux.mount_setattr(made, set_=now.set, clear=now.clear)
        else:
            made = new_filesystem(mount.type, mount.source, data, now.set)
            if copy_up:
                copy_tree(target, made)
            linux.move_mount(made, target)
    finally:
        os.close(target)
    _set_rest(made, mount)
    if later:
        return [made]
    os.close(made)
    return []


def new_filesystem(kind: str, source: str, data: tuple[str, ...], attributes: int) -> int:
    """A detached mount. Raises OSError with the kernel's own explanation where it gives one."""
    context = linux.fsopen(kind)
    try:
        if source:
            linux.fsconfig(context, "source", source)
        for word in data:
            key, equals, value = word.partition("=")
            linux.fsconfig(context, key, value if equals else None)
        linux.fscreate(context)
        return linux.fsmount(context, attributes)
    except OSError as err:
        raise OSError(err.errno, _explained(context, err), err.filename) from None
    finally:
        os.close(context)


def _explained(context: int, error: OSError) -> str:
    try:
        said = os.read(context, 1024).decode(errors="replace").strip()
    except OSError:  # ENODATA: nothing to say
        return error.strerror or str(error)
    return f"{error.strerror} ({said.partition(' ')[2] or said})"


def _bind(root: int, mount: MountStep) -> list[int]:
    options = mount.options
    tree = mount.tree if mount.tree >= 0 else clone_tree(mount.source, recursive=options.recursive)
    try:
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            target = inroot.make_directories(root, mount.destination)
        else:
            target = inroot.make_file(root, mount.destination)
            # move_mount(2) would call it an invalid argument.
            if stat.S_ISDIR(os.fstat(target).st_mode):
                os.close(target)
                raise SetupFailed(
                    f"{mount.place}: {mount.source} is not a directory, and {mount.destination} of the root file "
                    "system is one; mount it at the path of a file"
                )
        try:
            if options.attributes:
                linux.mount_setattr(tree, set_=options.attributes.set, clear=options.attributes.clear)
            linux.move_mount(tree, target)
        finally:
            os.close(target)
        _set_rest(tree, mount)
    finally:
        os.close(tree)
    return []


def clone_tree(source: str, *, recursive: bool) -> int:
    """A detached copy of what is mounted at a path of the host."""
    flags = linux.OPEN_TREE_CLONE | (linux.AT_RECURSIVE if recursive else 0)
    return linux.open_tree(linux.AT_FDCWD, source, flags)


def _remount(root: int, mount: MountStep) -> list[int]:
    """Other attributes for what is mounted there already."""
    if mount.options.data:
        raise SetupFailed(f"{mount.place}: a remount cannot change {mount.options.data[0]!r}")
    target = inroot.open_path(root, mount.destination)
    try:
        attributes = mount.options.attributes
        if attributes:
            linux.mount_setattr(target, set_=attributes.set, clear=attributes.clear)
        _set_rest(target, mount)
    finally:
        os.close(target)
    return []


def _set_rest(fd: int, mount: MountStep) -> None:
    """What reaches into the mounts below, and propagation, once the mount has its place."""
    below = mount.options.recursive_attributes
    if below:
        linux.mount_setattr(fd, set_=below.set, clear=below.clear, recursive=True)
    for flag, recursive in mount.options.propagation:
        linux.mount_setattr(fd, propagation=flag, recursive=recursive)


def _mount_cgroup(root: int, mount: MountStep, cgroup_mounts: tuple[CgroupMount, ...]) -> list[int]:
    """The container's own groups and what is below them; nothing of the host's tree can be seen from there."""
    attributes = mount.options.attributes
    if len(cgroup_mounts) == 1 and not cgroup_mounts[0].name:
        target = inroot.make_directories(root, mount.destination)
        _attach_group(cgroup_mounts[0].path, target, attributes.set)
        return []
    folder = inroot.make_directories(root, mount.destination)
    top = new_filesystem("tmpfs", "cgroup", ("mode=755",), NOSUID | NODEV | NOEXEC)
    linux.move_mount(top, folder)
    os.close(folder)
    for each in cgroup_mounts:
        target = inroot.make_directories(top, each.name)
        _attach_group(each.path, target, attributes.set)
        for alias in each.aliases:
            os.symlink(each.name, alias, dir_fd=top)
    _set_rest(top, mount)
    if attributes.set & RDONLY:
        return [top]
    os.close(top)
    return []


def _attach_group(path: str, target: int, attributes: int) -> None:
    tree = clone_tree(path, recursive=False)
    linux.mount_setattr(tree, set_=attributes)
    linux.move_mount(tree, target)
    os.close(tree)
    os.close(target)


def make_readonly(root: int, path: str) -> None:
    """A path of the container that only the host may write to; one that is not there is fine."""
    try:
        target = inroot.open_path(root, path)
    except FileNotFoundError:
        return
    with step(f"linux.readonlyPaths: {path}"):
        tree = linux.open_tree(target, "", linux.AT_EMPTY_PATH | linux.OPEN_TREE_CLONE | linux.AT_RECURSIVE)
        linux.mount_setattr(tree, set_=RDONLY)
        linux.move_mount(tree, target)
        os.close(tree)
    os.close(target)


def mask(root: int, path: str) -> None:
    """Hide a path: a directory becomes empty, a file /dev/null."""
    try:
        target = inroot.open_path(root, path)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOTDIR):
            return
        raise
    with step(f"linux.maskedPaths: {path}"):
        if stat.S_ISDIR(os.fstat(target).st_mode):
            tree = new_filesystem(
                "tmpfs", "tmpfs", ("nr_inodes=1", "mode=555"), RDONLY | NOSUID | NODEV | NOEXEC
            )
        else:
            tree = _host_null()
        linux.move_mount(tree, target)
        os.close(tree)
    os.close(target)


def _host_null() -> int:
    """The host's /dev/null, not what the container calls so."""
    tree = clone_tree("/dev/null", recursive=False)
    details = os.fstat(tree)
    if not stat.S_ISCHR(details.st_mode) or details.st_rdev != os.makedev(1, 3):
        raise SetupFailed("linux.maskedPaths: the host's /dev/null is not the null device")
    return tree
