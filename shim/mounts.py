"""mount(2) and its relatives for the daemon and `delete`. Flags are those of linux/mount.h.

The daemon lives in a mount namespace of its own, a slave of the host's: what it mounts is seen by its own helper
programs only and vanishes with them. What it binds it takes from the host's namespace, where it always is.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC = 16, 32, 64, 128
MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME, MS_BIND = 256, 1024, 2048, 4096
MS_MOVE, MS_REC, MS_SILENT = 8192, 16384, 32768
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_CLONE_FS, _CLONE_NEWNS = 0x200, 0x20000
# The same on all architectures.
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_OPENAT2, _SYS_MOUNT_SETATTR = 428, 429, 437, 442
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000  # linux/fcntl.h
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4  # linux/mount.h
_TMPFS_MAGIC, _HUGETLBFS_MAGIC = 0x01021994, 0x958458F6  # linux/magic.h
_RESOLVE_IN_ROOT = 0x10  # linux/openat2.h
# The kernel copies one page of mount data and cuts off the rest without a word (fs/namespace.c).
_DATA_LIMIT = os.sysconf("SC_PAGESIZE") - 1

FLAGS: dict[str, tuple[int, bool]] = {  # option -> (flag, whether it is set or cleared)
    "ro": (MS_RDONLY, True),
    "rw": (MS_RDONLY, False),
    "nosuid": (MS_NOSUID, True),
    "suid": (MS_NOSUID, False),
    "nodev": (MS_NODEV, True),
    "dev": (MS_NODEV, False),
    "noexec": (MS_NOEXEC, True),
    "exec": (MS_NOEXEC, False),
    "sync": (MS_SYNCHRONOUS, True),
    "async": (MS_SYNCHRONOUS, False),
    "dirsync": (MS_DIRSYNC, True),
    "mand": (MS_MANDLOCK, True),
    "nomand": (MS_MANDLOCK, False),
    "noatime": (MS_NOATIME, True),
    "atime": (MS_NOATIME, False),
    "nodiratime": (MS_NODIRATIME, True),
    "diratime": (MS_NODIRATIME, False),
    "relatime": (MS_RELATIME, True),
    "norelatime": (MS_RELATIME, False),
    "strictatime": (MS_STRICTATIME, True),
    "nostrictatime": (MS_STRICTATIME, False),
    "bind": (MS_BIND, True),
    "rbind": (MS_BIND | MS_REC, True),
}
# The flags of mount(2) that mount_setattr(2) can set for a bind.
_ATTRIBUTES = {MS_RDONLY: 0x1, MS_NOSUID: 0x2, MS_NODEV: 0x4, MS_NOEXEC: 0x8, MS_NODIRATIME: 0x80}
PROPAGATION = {
    "private": MS_PRIVATE, "rprivate": MS_PRIVATE | MS_REC,
    "slave": MS_SLAVE, "rslave": MS_SLAVE | MS_REC,
    "shared": MS_SHARED, "rshared": MS_SHARED | MS_REC,
    "unbindable": MS_UNBINDABLE, "runbindable": MS_UNBINDABLE | MS_REC,
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str, path: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}", path)


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2).

    Raises:
        OSError: the kernel refused; the message says what was to be mounted.
    """
    result = _libc.mount(
        source.encode(),
        target.encode(),
        fstype.encode() or None,
        ctypes.c_ulong(flags),
        data.encode() or None,
    )
    _check(result, f"cannot mount {fstype or 'bind'} {source}", target)


def detach(target: str) -> None:
    """Unmount `target` now for everybody new, and for good when its last user is gone. A path that is no mount
    point, or is gone, is fine.

    Raises:
        OSError: the kernel refused for another reason.
    """
    if _libc.umount2(target.encode(), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
        number = ctypes.get_errno()
        if OSError(number, "").errno not in (22, 2):  # EINVAL: not a mount point; ENOENT
            raise OSError(number, f"cannot unmount: {os.strerror(number)}", target)


def path_in_root(root: str, path: str) -> str:
    """Where `path` leads when `root` is taken for the root directory: no symlink and no `..` in it leads outside.

    Raises:
        OSError: there is nothing at the path.
    """
    found = _find_in_root(root, path)
    try:
        return os.readlink(f"/proc/self/fd/{found}")
    finally:
        os.close(found)


def head_in_root(root: str, path: str, size: int) -> bytes:
    """The first bytes of the regular file that `path` leads to in `root`, as above.

    Raises:
        OSError: there is none, or it cannot be read.
    """
    found = _find_in_root(root, path)
    try:
        # Looked at before it is opened: a device or a FIFO would notice, or wait.
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", path)
        file = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)
    try:
        return os.read(file, size)
    finally:
        os.close(file)


def _find_in_root(root: str, path: str) -> int:
    base = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)  # struct open_how
        words = (_SYS_OPENAT2, base, os.fsencode(path), how, len(how))
        return _syscall(f"cannot find {path} in it", root, *words)
    finally:
        os.close(base)


def parse_options(options: list[str]) -> tuple[int, int, str]:
    """Split fstab-style options into (flags, propagation flags, data for the file system)."""
    flags = propagation = 0
    data = []
    for option in options:
        if option in FLAGS:
            flag, setting = FLAGS[option]
            flags = flags | flag if setting else flags & ~flag
        elif option in PROPAGATION:
            propagation |= PROPAGATION[option]
        elif option not in ("defaults", "loop"):
            data.append(option)
    return flags, propagation, ",".join(data)


def mount_with_options(
    fstype: str, source: str, target: str, options: list[str], *, namespace: int | None = None
) -> None:
    """Mount as containerd describes it: overlays with more layers than fit into one page of options are mounted with
    paths relative to their parent, image files (with the option `loop`) by way of a loop device. `namespace` is that of
    the source of a bind, and of an image file.

    Raises:
        OSError: the kernel refused.
    """
    flags, propagation, data = parse_options(options)
    if flags & MS_BIND or fstype == "bind":
        bind(source, target, recursive=bool(flags & MS_REC), flags=flags, namespace=namespace)
    elif len(data) > _DATA_LIMIT and fstype == "overlay":
        _mount_long_overlay(source, target, flags, options)
    elif "loop" in options:
        _mount_image(fstype, source, target, flags, data, namespace)
    else:
        mount(source, target, fstype, flags, data)
    if propagation:
        mount("", target, "", propagation)


def bind(
    source: str, target: str, *, recursive: bool = False, flags: int = 0, namespace: int | None = None
) -> None:
    """`clone` and `attach` in one step.

    Raises:
        OSError: the kernel refused; nothing is left mounted.
    """
    tree = clone(source, recursive=recursive, flags=flags, namespace=namespace)
    try:
        attach(tree, target)
    finally:
        os.close(tree)


def clone(
    source: str,
    *,
    recursive: bool = False,
    flags: int = 0,
    follow: bool = False,
    namespace: int | None = None,
) -> int:
    """A copy of the file or directory `source` with its mounts, attached nowhere yet: a descriptor to be closed by the
    caller. `namespace` is the mount namespace in which `source` is looked for, None is this process's own.

    The mounts get their `flags`, those of _ATTRIBUTES, before they are attached: to copies at other places, which mount
    propagation makes at that moment, no later change would reach. What the host mounts and unmounts below `source`
    afterwards happens in the copy too when that shall `follow`; then what is in use in the copy keeps the host from
    unmounting it. Nothing ever happens the other way round.

    Raises:
        OSError: there is no such source, or the kernel refused.
    """
    below = _AT_RECURSIVE if recursive else 0
    tree = _open_tree(source, _OPEN_TREE_CLONE | os.O_CLOEXEC | below, namespace)
    try:
        attributes = sum(attribute for flag, attribute in _ATTRIBUTES.items() if flags & flag)
        # struct mount_attr: to set, to clear, propagation, user namespace
        wanted = struct.pack("QQQQ", attributes, 0, MS_SLAVE if follow else MS_PRIVATE, 0)
        words = (tree, b"", _AT_EMPTY_PATH | below, wanted, len(wanted))
        _syscall("cannot set the options of the mount", source, _SYS_MOUNT_SETATTR, *words)
    except OSError:
        os.close(tree)
        raise
    return tree


def attach(tree: int, target: str) -> None:
    """Mount what `clone` made. Raises OSError."""
    words = (tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
    _syscall("cannot mount there", target, _SYS_MOVE_MOUNT, *words)


def restrictions(descriptor: int) -> tuple[str, ...]:
    """Which of nosuid, nodev and noexec the mount has that a descriptor is in."""
    flags = os.fstatvfs(descriptor).f_flag  # the values of ST_NOSUID and so on are those of MS_NOSUID
    return tuple(name for name in ("nosuid", "nodev", "noexec") if flags & FLAGS[name][0])


def in_memory(path: str) -> bool:
    """Whether a path is in a file system that is in the host's memory. Raises OSError."""
    return _statfs(path)[0] in (_TMPFS_MAGIC, _HUGETLBFS_MAGIC)


def huge_page_bytes(path: str) -> int:
    """The size of a page where a path is in a file system of huge pages, else 0. Raises OSError."""
    kind, block_bytes = _statfs(path)
    return block_bytes if kind == _HUGETLBFS_MAGIC else 0


def _statfs(path: str) -> tuple[int, int]:
    answer = ctypes.create_string_buffer(256)  # struct statfs begins with the type and the size of a block
    _check(_libc.statfs(os.fsencode(path), answer), "cannot look at the file system", path)
    kind, block_bytes = struct.unpack_from("@ll", answer)
    return kind, block_bytes


def _open_tree(source: str, flags: int, namespace: int | None) -> int:
    words = ("cannot mount", source, _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), flags)
    if namespace is None:
        return _syscall(*words)
    own = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # The kernel moves only a thread that shares its root and working directory with no other thread.
        _check(_libc.unshare(_CLONE_FS), "cannot leave the mount namespace", "/")
        _check(_libc.setns(namespace, _CLONE_NEWNS), "cannot enter the host's mount namespace", "/")
        try:
            return _syscall(*words)
        finally:
            _check(_libc.setns(own, _CLONE_NEWNS), "cannot return to the mount namespace", "/")
    finally:
        os.close(own)


def _syscall(what: str, path: str, *words: int | bytes) -> int:
    arguments = [ctypes.c_long(word) if isinstance(word, int) else word for word in words]
    result: int = _libc.syscall(*arguments)
    _check(min(result, 0), what, path)
    return result


def open_source(source: str, *, writable: bool, namespace: int | None = None) -> int:
    """A block device or an image file, opened: a descriptor to be closed by the caller. `namespace` as in `clone`.

    Raises:
        OSError: there is none, or it is something else, which is not opened: a FIFO or a device may do anything then.
    """
    found = _open_tree(source, os.O_CLOEXEC, namespace)
    try:
        mode = os.fstat(found).st_mode
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
            raise OSError(errno.ENOTBLK, "neither a block device nor an image file", source)
        access = os.O_RDWR if writable else os.O_RDONLY
        try:
            return os.open(f"/proc/self/fd/{found}", access | os.O_CLOEXEC)
        except OSError as err:
            raise OSError(err.errno, f"cannot open it: {err.strerror}", source) from err
    finally:
        os.close(found)


def open_directory(source: str, *, namespace: int | None = None) -> int:
    """A directory as the place of files in it (O_PATH): a descriptor to be closed by the caller. `namespace` as in
    `clone`.

    Raises:
        OSError: there is none.
    """
    found = _open_tree(source, os.O_CLOEXEC, namespace)
    if not stat.S_ISDIR(os.fstat(found).st_mode):
        os.close(found)
        raise NotADirectoryError(errno.ENOTDIR, "not a directory", source)
    return found


def kind_of(source: str, *, namespace: int | None = None) -> int:
    """The type bits of a file's mode (stat(2)), symlinks followed; 0 when there is no such file."""
    try:
        found = _open_tree(source, os.O_CLOEXEC, namespace)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    try:
        return stat.S_IFMT(os.fstat(found).st_mode)
    finally:
        os.close(found)


def _mount_image(fstype: str, source: str, target: str, flags: int, data: str, namespace: int | None) -> None:
    from shim import loop

    read_only = bool(flags & MS_RDONLY)
    image = open_source(source, writable=not read_only, namespace=namespace)
    try:
        with loop.attached(image, read_only=read_only) as device:
            mount(device, target, fstype, flags, data)
    finally:
        os.close(image)


def _mount_long_overlay(source: str, target: str, flags: int, options: list[str]) -> None:
    values = dict(option.split("=", 1) for option in options if option.startswith("lowerdir="))
    layers = values.get("lowerdir", "").split(":")
    parent = os.path.commonpath(layers)
    relative = ":".join(os.path.relpath(layer, parent) for layer in layers)
    rest = [option for option in options if not option.startswith("lowerdir=")]
    _, _, data = parse_options([*rest, f"lowerdir={relative}"])
    if len(data) > _DATA_LIMIT:
        raise OSError(7, f"the image's {len(layers)} layers do not fit into one mount call", target)
    # Threads share their working directory unless they leave the others; then it is this one's, for one system call.
    _check(_libc.unshare(_CLONE_FS), "cannot leave the other threads' working directory", target)
    before = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        os.chdir(parent)
        mount(source, target, "overlay", flags, data)
    finally:
        os.fchdir(before)
        os.close(before)


def enter_private_mount_namespace() -> int:
    """Give this process, and all it starts, a mount namespace that the host does not see. It follows the host's mounts
    only where the host shares them, which is not so everywhere: what is returned is a descriptor of the namespace left.

    Raises:
        OSError: not allowed (needs CAP_SYS_ADMIN).
    """
    left = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(_CLONE_NEWNS), "cannot unshare the mount namespace", "/")
        mount("", "/", "", MS_REC | MS_SLAVE)
    except OSError:
        os.close(left)
        raise
    return left
