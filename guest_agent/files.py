"""Files that the host sends when it shares no file system, written inside one directory and nowhere else."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from guest_agent.errors import InvalidRequest

if TYPE_CHECKING:
    from agent_proto.gen import agent_pb2

SHARED_DIR = "/run/kata-containers/shared/containers"
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def copy(request: agent_pb2.CopyFileRequest, base: str = SHARED_DIR) -> None:
    """Write one piece of a file, or make a directory or a symbolic link. The file appears under its name when it
    is complete. Links in the way are not followed, since containers can write to the same directories.

    Raises InvalidRequest, OSError.
    """
    prefix = base + "/"
    parts = request.path[len(prefix) :].split("/")
    if (
        not request.path.startswith(prefix)
        or "\0" in request.path
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise InvalidRequest(f"{request.path!r} is not a path below {base}")
    os.makedirs(base, exist_ok=True)
    parent = _open_parent(base, parts[:-1], stat.S_IMODE(request.dir_mode) or 0o755)
    try:
        kind = stat.S_IFMT(request.file_mode)
        if kind == stat.S_IFDIR:
            _make_directory(parent, parts[-1], request)
        elif kind == stat.S_IFLNK:
            _make_link(parent, parts[-1], request)
        elif kind in (stat.S_IFREG, 0):
            _write_piece(parent, parts[-1], request)
        else:
            raise InvalidRequest(f"{request.path}: cannot copy a file of mode {request.file_mode:o}")
    finally:
        os.close(parent)


def _open_parent(base: str, names: list[str], mode: int) -> int:
    current = os.open(base, _DIRECTORY)
    for name in names:
        with suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=current)
        try:
            following = os.open(name, _DIRECTORY, dir_fd=current)
        finally:
            os.close(current)
        current = following
    return current


def _make_directory(parent: int, name: str, request: agent_pb2.CopyFileRequest) -> None:
    with suppress(FileExistsError):
        os.mkdir(name, dir_fd=parent)
    fd = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        os.fchmod(fd, stat.S_IMODE(request.file_mode))
        os.fchown(fd, request.uid, request.gid)
    finally:
        os.close(fd)


def _make_link(parent: int, name: str, request: agent_pb2.CopyFileRequest) -> None:
    if not request.data or b"\0" in request.data:
        raise InvalidRequest(f"{request.path}: a symbolic link cannot point to {request.data[:100]!r}")
    temporary = f"{name}.tmp"
    _unlink_if_there(temporary, parent)
    os.symlink(os.fsdecode(request.data), temporary, dir_fd=parent)
    os.chown(temporary, request.uid, request.gid, dir_fd=parent, follow_symlinks=False)
    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def _write_piece(parent: int, name: str, request: agent_pb2.CopyFileRequest) -> None:
    end = request.offset + len(request.data)
    if request.offset < 0 or end > request.file_size:
        raise InvalidRequest(
            f"{request.path}: bytes {request.offset} to {end} of a file of {request.file_size}"
        )
    temporary = f"{name}.tmp"
    if request.offset == 0:
        _unlink_if_there(temporary, parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=parent)
    try:
        view, position = memoryview(request.data), request.offset
        while view:
            written = os.pwrite(fd, view, position)
            view, position = view[written:], position + written
        if end < request.file_size:
            return
        os.ftruncate(fd, request.file_size)
        os.fchown(fd, request.uid, request.gid)
        os.fchmod(fd, stat.S_IMODE(request.file_mode))
    finally:
        os.close(fd)
    os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)


def _unlink_if_there(name: str, parent: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=parent)
