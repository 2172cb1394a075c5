"""mount(2) and its relatives for the daemon and `delete`. Flags are those of linux/mount.h.

The daemon lives in a mount namespace of its own, a slave of the host's: what it mounts is seen by its own helper
programs only and vanishes with them, and what the host mounts or unmounts later still reaches it.
"""

from __future__ import annotations

import ctypes
import os

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_SYNCHRONOUS, MS_REMOUNT, MS_MANDLOCK, MS_DIRSYNC = 16, 32, 64, 128
MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME, MS_BIND = 256, 1024, 2048, 4096
MS_MOVE, MS_REC, MS_SILENT = 8192, 16384, 32768
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MS_RELATIME, MS_STRICTATIME, MS_LAZYTIME = 1 << 21, 1 << 24, 1 << 25
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_CLONE_NEWNS = 0x20000
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


def mount_with_options(fstype: str, source: str, target: str, options: list[str]) -> None:
    """Mount as containerd describes it: bind mounts get their read-only flag by the second mount call they need,
    overlays with more layers than fit into one page of options are mounted with paths relative to their parent.

    Raises:
        OSError: the kernel refused.
    """
    flags, propagation, data = parse_options(options)
    if flags & MS_BIND or fstype == "bind":
        bind(source, target, recursive=bool(flags & MS_REC), flags=flags & ~(MS_BIND | MS_REC))
    elif len(data) > _DATA_LIMIT and fstype == "overlay":
        _mount_long_overlay(source, target, flags, options)
    else:
        mount(source, target, fstype, flags, data)
    if propagation:
        mount("", target, "", propagation)


def bind(source: str, target: str, *, recursive: bool = False, flags: int = 0) -> None:
    """Bind `source` onto `target`; `flags` such as MS_RDONLY take effect by a remount, as the kernel wants it.

    Raises:
        OSError: the kernel refused; nothing is left mounted.
    """
    mount(source, target, "", MS_BIND | (MS_REC if recursive else 0))
    if flags:
        try:
            mount("", target, "", MS_BIND | MS_REMOUNT | flags)
        except OSError:
            detach(target)
            raise


def _mount_long_overlay(source: str, target: str, flags: int, options: list[str]) -> None:
    values = dict(option.split("=", 1) for option in options if option.startswith("lowerdir="))
    layers = values.get("lowerdir", "").split(":")
    parent = os.path.commonpath(layers)
    relative = ":".join(os.path.relpath(layer, parent) for layer in layers)
    rest = [option for option in options if not option.startswith("lowerdir=")]
    _, _, data = parse_options([*rest, f"lowerdir={relative}"])
    if len(data) > _DATA_LIMIT:
        raise OSError(7, f"the image's {len(layers)} layers do not fit into one mount call", target)
    # The whole process changes its directory, but only for the time of one system call on its only thread.
    before = os.open(".", os.O_PATH | os.O_DIRECTORY)
    try:
        os.chdir(parent)
        mount(source, target, "overlay", flags, data)
    finally:
        os.fchdir(before)
        os.close(before)


def enter_private_mount_namespace() -> None:
    """Give this process, and all it starts, a mount namespace that follows the host's but is not seen by it.

    Raises:
        OSError: not allowed (needs CAP_SYS_ADMIN).
    """
    _check(_libc.unshare(_CLONE_NEWNS), "cannot unshare the mount namespace", "/")
    mount("", "/", "", MS_REC | MS_SLAVE)
