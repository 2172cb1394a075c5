"""A writer of the kernel's initial file system: cpio in the "newc" format.

Our own, because a cpio program needs root to archive device nodes and root-owned files, and because the
same tree must give the same bytes: entries are sorted, times are zero, inode numbers count up.
Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from guest_image.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TRAILER = "TRAILER!!!"
#: A file's size is a field of eight hexadecimal digits.
_MAX_SIZE = 0xFFFFFFFF


@dataclass(frozen=True)
class Entry:
    """One file, directory, link or device. `mode` holds the type and the permission bits (st_mode)."""

    mode: int
    data: bytes = b""
    device: int = 0


class Tree:
    """Paths of the future root file system. Parent directories appear by themselves, mode 0755."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __contains__(self, path: str) -> bool:
        return _key(path) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        """Sorted, so that a directory comes before what is in it."""
        return iter(sorted(self._entries.items()))

    def _add(self, path: str, entry: Entry) -> None:
        key = _key(path)
        known = self._entries.get(key)
        if known is not None and known != entry:
            raise ImageError(f"the image has two different files for /{key}")
        for parent in reversed(PurePosixPath(key).parents[:-1]):
            self._entries.setdefault(str(parent), Entry(stat.S_IFDIR | 0o755))
        self._entries[key] = entry

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, Entry(stat.S_IFDIR | mode))

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._add(path, Entry(stat.S_IFREG | mode, data))

    def symlink(self, path: str, target: str) -> None:
        self._add(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, Entry(stat.S_IFCHR | mode, device=os.makedev(major, minor)))

    def to_cpio(self) -> bytes:
        """The archive, ready for `-initrd`."""
        archive = bytearray()
        for inode, (path, entry) in enumerate(self, start=1):
            _write(archive, inode, path, entry)
        _write(archive, 0, _TRAILER, Entry(0))
        return bytes(archive)


def _key(path: str) -> str:
    key = str(PurePosixPath("/", path)).lstrip("/")
    if not key or ".." in PurePosixPath(key).parts:
        raise ImageError(f"{path!r} is not a path inside the image")
    return key


def _write(archive: bytearray, inode: int, name: str, entry: Entry) -> None:
    if len(entry.data) > _MAX_SIZE:
        raise ImageError(f"{name} is too large for an initrd: {len(entry.data)} bytes")
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    raw_name = name.encode() + b"\0"
    fields = (
        inode, entry.mode, 0, 0, links, 0, len(entry.data),
        0, 0, os.major(entry.device), os.minor(entry.device), len(raw_name), 0,
    )  # fmt: skip
    archive += b"070701" + b"".join(b"%08X" % field for field in fields) + raw_name
    _pad(archive)
    archive += entry.data
    _pad(archive)


def _pad(archive: bytearray) -> None:
    archive += bytes(-len(archive) % 4)
