"""Copies, in the guest's memory, of small directories of the host that change: ConfigMaps, Secrets and their like.

What the host changes in a directory that it shares shows in the guest, but nobody in the guest is notified of it. So
the host sends such a directory, piece by piece, and here it becomes what containers see: by the steps in which a
kubelet changes the original, and inotify tells of each.
"""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

from guest_agent.errors import InvalidRequest

if TYPE_CHECKING:
    from agent_proto.gen.kata_py_agent_pb2 import MirrorEntry, UpdateMirrorRequest

#: What is done between two looks at what else there is to do: some ten milliseconds in an emulated guest.
_STEPS = 64
#: The link by which a kubelet changes from one version of all files to the next. Other links lead through it.
_VERSION = "..data"


class Mirrors:
    """The copies, each in a directory of its own in `base`: `tree` is what containers see, and `next` is what the host
    has sent since the first piece."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._locks: dict[str, asyncio.Lock] = {}

    async def update(self, request: UpdateMirrorRequest) -> None:
        """Take one piece; the last one changes what is seen. Raises InvalidRequest, OSError."""
        folder = self._folder(request.name)
        async with self._locks.setdefault(request.name, asyncio.Lock()):
            coming, tree = f"{folder}/next", f"{folder}/tree"
            if request.first:
                os.makedirs(tree, exist_ok=True)
                await _delete(coming)
                os.mkdir(coming)
            for entry in request.entries:
                _make(coming, entry)
            if request.last:
                await _become(tree, coming)
                await _delete(coming)

    async def remove(self, name: str) -> None:
        """Forget one. Harmless when there is none. Raises InvalidRequest, OSError."""
        folder = self._folder(name)
        async with self._locks.setdefault(name, asyncio.Lock()):
            await _delete(folder)
        self._locks.pop(name, None)

    def _folder(self, name: str) -> str:
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise InvalidRequest(f"{name!r} cannot be the name of a mirror")
        return f"{self._base}/{name}"


def _make(folder: str, entry: MirrorEntry) -> None:
    parts = os.fsdecode(entry.path).split("/")
    if parts != ["."] and any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise InvalidRequest(f"{entry.path!r} is not a path in a mirror")
    path = "/".join((folder, *parts))
    if stat.S_ISLNK(entry.mode):
        os.symlink(entry.data, os.fsencode(path))
        os.lchown(path, entry.uid, entry.gid)
        return
    if stat.S_ISDIR(entry.mode):
        if parts != ["."]:
            os.mkdir(path)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    elif stat.S_ISREG(entry.mode):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    else:
        raise InvalidRequest(f"{entry.path!r}: a mirror has no file of mode {entry.mode:o}")
    try:
        view = memoryview(entry.data)
        while view:
            view = view[os.write(fd, view) :]
        os.fchown(fd, entry.uid, entry.gid)
        os.fchmod(fd, stat.S_IMODE(entry.mode))
    finally:
        os.close(fd)


async def _become(live: str, wanted: str) -> None:
    """Make the directory `live` like `wanted`, from which things are moved. Whoever reads meanwhile finds what there
    was or what there will be: what links lead to comes before them, and what nothing leads to any more goes last."""
    _copy_attributes(live, wanted)
    names = sorted(os.listdir(wanted), key=lambda name: _turn(wanted, name))
    for count, name in enumerate(names):
        if count % _STEPS == 0:
            await asyncio.sleep(0)
        old, new = f"{live}/{name}", f"{wanted}/{name}"
        if not os.path.lexists(old):
            os.rename(new, old)
        elif _is_directory(old) and _is_directory(new):
            await _become(old, new)
        elif not _alike(old, new):
            if _is_directory(old) or _is_directory(new):
                await _delete(old)
            os.rename(new, old)
    kept = set(names)
    for name in sorted(os.listdir(live), key=lambda name: _is_directory(f"{live}/{name}")):
        if name not in kept:
            await _delete(f"{live}/{name}")


def _turn(folder: str, name: str) -> tuple[bool, bool, str]:
    return os.path.islink(f"{folder}/{name}"), name != _VERSION, name


def _is_directory(path: str) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _alike(one: str, other: str) -> bool:
    """Whether two things, of which one at most is a directory, could stand for each other."""
    a, b = os.lstat(one), os.lstat(other)
    if (a.st_mode, a.st_uid, a.st_gid, a.st_size) != (b.st_mode, b.st_uid, b.st_gid, b.st_size):
        return False
    if stat.S_ISLNK(a.st_mode):
        return os.readlink(one) == os.readlink(other)
    with open(one, "rb") as first, open(other, "rb") as second:
        return first.read() == second.read()


def _copy_attributes(target: str, source: str) -> None:
    a, b = os.lstat(target), os.lstat(source)
    if (a.st_uid, a.st_gid) != (b.st_uid, b.st_gid):
        os.chown(target, b.st_uid, b.st_gid)
    if os.lstat(target).st_mode != b.st_mode:  # which a new owner may have changed
        os.chmod(target, stat.S_IMODE(b.st_mode))


async def _delete(path: str) -> None:
    """Whatever is there, a bit at a time."""
    if not _is_directory(path):
        if os.path.lexists(path):
            os.unlink(path)
        return
    for count, name in enumerate(os.listdir(path)):
        if count % _STEPS == 0:
            await asyncio.sleep(0)
        await _delete(f"{path}/{name}")
    os.rmdir(path)
