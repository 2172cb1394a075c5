"""A directory as a kubelet writes it (ConfigMaps, Secrets and their like), read one version at a time.

All files of a version are in a directory of their own; one link leads to it, and changes from one version to the next.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from agent_proto.gen.kata_py_agent_pb2 import MirrorEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

# Kubernetes' own limit for one ConfigMap or Secret is 1 MiB; projected volumes have several of them.
LIMIT_BYTES = 8 << 20
LIMIT_FILES = 10_000
# One file has to fit into a message, for which ttrpc allows 4 MiB.
LIMIT_FILE_BYTES = 3 << 20
# What is read, and sent, in one go: a few milliseconds.
_PIECE_FILES, _PIECE_BYTES = 128, 512 << 10
# The link by which a kubelet goes from one version of all files to the next; what else begins like this is a version.
_VERSION, _VERSIONS = "..data", ".."


def is_news(name: str) -> bool:
    """Whether a change of this name in the directory changes what its readers see; versions come and go unseen."""
    return name == _VERSION or not name.startswith(_VERSIONS)


class NotMirrored(Exception):
    """This directory is no copy in the guest; says why."""


class Unsteady(Exception):
    """The directory has changed while it was read."""


def pieces(root: int) -> Iterator[list[MirrorEntry]]:
    """What is in a directory, one version of it, in pieces that can be sent. `root` is a descriptor of it.

    Raises:
        NotMirrored: it is too large, or not written as a kubelet writes.
        Unsteady: it changed meanwhile; some time soon it is to be read again.
        OSError: it cannot be read.
    """
    piece: list[MirrorEntry] = []
    piece_bytes = total_bytes = total_files = 0
    version = _version(root)
    try:
        for entry in _entries(root, version):
            total_files += 1
            total_bytes += len(entry.data)
            if total_files > LIMIT_FILES or total_bytes > LIMIT_BYTES or len(entry.data) > LIMIT_FILE_BYTES:
                raise NotMirrored(
                    f"it is larger than {LIMIT_FILES} files, {LIMIT_BYTES >> 20} MiB in all or "
                    f"{LIMIT_FILE_BYTES >> 20} MiB in one file"
                )
            piece.append(entry)
            piece_bytes += len(entry.data)
            if len(piece) >= _PIECE_FILES or piece_bytes >= _PIECE_BYTES:
                yield piece
                piece, piece_bytes = [], 0
    except (FileNotFoundError, NotADirectoryError) as err:
        raise Unsteady from err
    if _version(root) != version:
        raise Unsteady
    yield piece


def _version(root: int) -> str:
    try:
        version = os.readlink(_VERSION, dir_fd=root)
    except OSError as err:
        raise NotMirrored(f"it has no link {_VERSION}, which a kubelet makes") from err
    if not version.startswith(_VERSIONS) or "/" in version:
        raise NotMirrored(f"its link {_VERSION} leads elsewhere")
    return version


def _entries(root: int, version: str) -> Iterator[MirrorEntry]:
    info = os.fstat(root)
    yield MirrorEntry(path=b".", mode=info.st_mode, uid=info.st_uid, gid=info.st_gid)
    for name in sorted(os.listdir(root)):
        if name in (_VERSION, version) or not name.startswith(_VERSIONS):
            yield from _entry(root, name, os.fsencode(name))


def _entry(folder: int, name: str, path: bytes) -> Iterator[MirrorEntry]:
    info = os.stat(name, dir_fd=folder, follow_symlinks=False)
    entry = MirrorEntry(path=path, mode=info.st_mode, uid=info.st_uid, gid=info.st_gid)
    if stat.S_ISLNK(info.st_mode):
        entry.data = os.fsencode(os.readlink(name, dir_fd=folder))
        yield entry
    elif stat.S_ISREG(info.st_mode):
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        with open(fd, "rb", buffering=0) as file:
            # One byte more than allowed tells that there is more.
            entry.data = file.read(min(os.fstat(fd).st_size, LIMIT_FILE_BYTES + 1)) or b""
        yield entry
    elif stat.S_ISDIR(info.st_mode):
        yield entry
        below = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
        try:
            for inner in sorted(os.listdir(below)):
                yield from _entry(below, inner, b"%s/%s" % (path, os.fsencode(inner)))
        finally:
            os.close(below)
