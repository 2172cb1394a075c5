"""Copies what a directory of the image holds into the tmpfs that will cover it (`tmpcopyup`)."""

from __future__ import annotations

import os
import stat


def copy_tree(source: int, target: int) -> None:
    """Files, directories, links and devices with their owners and modes; links are copied, never followed."""
    directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=source)
    try:
        for name in os.listdir(directory):
            _copy(directory, target, name)
        # Last: a directory may not allow its owner to write.
        details = os.fstat(directory)
        os.chown(".", details.st_uid, details.st_gid, dir_fd=target)
        os.chmod(".", stat.S_IMODE(details.st_mode), dir_fd=target)
    finally:
        os.close(directory)


def _copy(source: int, target: int, name: str) -> None:
    details = os.stat(name, dir_fd=source, follow_symlinks=False)
    mode = stat.S_IMODE(details.st_mode)
    if stat.S_ISDIR(details.st_mode):
        os.mkdir(name, 0o700, dir_fd=target)
        flags = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        below_source = os.open(name, os.O_PATH | flags, dir_fd=source)
        below_target = os.open(name, os.O_RDONLY | flags, dir_fd=target)
        copy_tree(below_source, below_target)
        os.close(below_source)
        os.close(below_target)
        return
    if stat.S_ISLNK(details.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        os.chown(name, details.st_uid, details.st_gid, dir_fd=target, follow_symlinks=False)
        return
    if stat.S_ISREG(details.st_mode):
        _copy_file(source, target, name, details.st_size)
    else:
        os.mknod(name, details.st_mode, details.st_rdev, dir_fd=target)
    os.chown(name, details.st_uid, details.st_gid, dir_fd=target)
    os.chmod(name, mode, dir_fd=target)


def _copy_file(source: int, target: int, name: str, size: int) -> None:
    reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
    writer = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
    try:
        copied = 0
        while copied < size:
            done = os.sendfile(writer, reader, copied, size - copied)
            if done == 0:
                break
            copied += done
    finally:
        os.close(reader)
        os.close(writer)
