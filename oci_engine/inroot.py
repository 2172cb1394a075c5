"""Paths below the root file system of a container, which may be anybody's and full of symbolic links.

`resolve` answers where a path leads when the container's root is `/`, also for what is not there yet. What is then
opened is opened by the kernel itself without following any link, so a file system that changes in between makes an
error, and never a file of the host.
"""

from __future__ import annotations

import errno
import os
import stat

from oci_engine import linux
from oci_engine.undo import suppress

#: As the kernel itself, MAXSYMLINKS.
_MAX_LINKS = 40
_SAFE = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
_NO_LINKS = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_SYMLINKS


def resolve(root: int, path: str) -> str:
    """The path without links and dots, relative to the root directory; `.` for that itself."""
    found: list[str] = []
    rest = path.split("/")[::-1]
    links = 0
    while rest:
        name = rest.pop()
        if name in ("", "."):
            continue
        if name == "..":
            del found[-1:]
            continue
        try:
            target = os.readlink("/".join([*found, name]), dir_fd=root)
        except OSError:  # no link, or nothing there yet
            found.append(name)
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        if target.startswith("/"):
            found.clear()
        rest += target.split("/")[::-1]
    return "/".join(found) or "."


def open_path(root: int, path: str, flags: int = os.O_PATH, *, follow: bool = True) -> int:
    """Open what is there. Without `follow`, a link anywhere on the way is an error (ELOOP)."""
    return linux.openat2(root, path, flags, _SAFE if follow else _NO_LINKS)


def make_directories(root: int, path: str, mode: int = 0o755, *, follow: bool = True) -> int:
    """Open a directory (O_PATH), after making it and those above it where they are missing."""
    names = (resolve(root, path) if follow else path).split("/")
    here = open_path(root, ".", os.O_PATH | os.O_DIRECTORY)
    try:
        for name in names:
            if name in ("", "."):
                continue
            with suppress(FileExistsError):
                os.mkdir(name, mode, dir_fd=here)
            below = linux.openat2(
                here, name, os.O_PATH | os.O_DIRECTORY, linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS
            )
            os.close(here)
            here = below
    except BaseException:
        os.close(here)
        raise
    return here


def make_file(root: int, path: str) -> int:
    """Open a file (O_PATH), after making an empty one with its directories where there is nothing."""
    folder, _, name = resolve(root, path).rpartition("/")
    parent = make_directories(root, folder or ".", follow=False)
    try:
        with suppress(FileExistsError):
            os.close(
                os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644, dir_fd=parent)
            )
        return linux.openat2(parent, name, os.O_PATH, linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS)
    finally:
        os.close(parent)


def read_text(root: int, path: str, limit: int) -> str:
    """The first `limit` bytes of a regular file; empty for anything else, and for what is not there."""
    try:
        fd = open_path(root, path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return ""
        return os.read(fd, limit).decode(errors="surrogateescape")
    finally:
        os.close(fd)
