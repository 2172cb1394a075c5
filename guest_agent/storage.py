"""Storages: what the host asks to have mounted in the guest before a container uses it.

Several containers may name the same mount point; it is mounted once and unmounted with its last user.
"""

from __future__ import annotations

import errno
import os
import stat
from asyncio import Lock
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from guest_agent import syscalls
from guest_agent.errors import InvalidRequest, NotSupported
from guest_agent.mount import mount, unmount
from guest_agent.spawn import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from agent_proto.gen import agent_pb2
    from guest_agent.hugepages import Reservation
    from guest_agent.modules import Modules
    from guest_agent.reaper import Reaper

    Handler = Callable[["agent_pb2.Storage"], None]

#: The name under which the sandbox itself uses storages; no container id may contain a slash.
SANDBOX_USER = "/sandbox"
#: types.FSGroupChangePolicy.OnRootMismatch
_ON_ROOT_MISMATCH = 1
_SETGID_GROUP_BITS = 0o2070
_CLONE_FS = 0x200
#: As much as mount(2) takes: the rest of a page, and it cuts off what is longer without a word.
_DATA_LIMIT = 4095
#: Storages whose mounting may wait long: for a disk, and for the log of the file system on it.
_SLOW = frozenset({"blk", "blk-ccw", "mmioblk", "nvdimm", "scsi", "overlayfs"})


class Storages:
    """What is mounted, and for whom."""

    def __init__(self, modules: Modules, reaper: Reaper | None = None) -> None:
        self._modules = modules
        self._reaper = reaper
        self._users: dict[str, set[str]] = {}
        self._made: set[str] = set()
        self._on_disks: set[str] = set()
        # By mount point and user.
        self._huge_pages: dict[tuple[str, str], Reservation] = {}
        # One for each mount point: who comes second waits until the first one has mounted it.
        self._locks: WeakValueDictionary[str, Lock] = WeakValueDictionary()
        # The first one unpacks the program for all.
        self._encrypting = Lock()
        self._handlers: dict[str, Handler] = {
            "virtio-fs": self._mount_as_is,
            "9p": self._mount_9p,
            "overlayfs": self._mount_overlay,
            "ephemeral": self._mount_ephemeral,
            "local": self._make_local,
            "bind": self._bind,
            # Changes of a shared directory show in a bind of it at once, so there is nothing to watch.
            "watchable-bind": self._bind,
            "blk": self._mount_device,
            "blk-ccw": self._mount_device,
            "mmioblk": self._mount_device,
            "nvdimm": self._mount_device,
            "scsi": self._mount_device,
        }

    @property
    def drivers(self) -> list[str]:
        return sorted(self._handlers)

    async def add(self, storages: Iterable[agent_pb2.Storage], user: str) -> None:
        """Mount what is not mounted yet, for `user`. All or nothing: when one fails, those before it are released.

        Raises NotSupported, InvalidRequest, OSError.
        """
        added: list[str] = []
        try:
            for storage in _spread(storages, user):
                async with self._locks.setdefault(storage.mount_point, Lock()):
                    if await self._add(storage, user):
                        added.append(storage.mount_point)
        except BaseException:
            for mount_point in reversed(added):
                self._release(mount_point, user)
            raise

    async def _add(self, storage: agent_pb2.Storage, user: str) -> bool:
        handler = self._handlers.get(storage.driver)
        if handler is None:
            raise NotSupported(f"storage driver {storage.driver!r} for {storage.mount_point}")
        if not storage.mount_point.startswith("/"):
            raise InvalidRequest(f"storage mount point {storage.mount_point!r} is not an absolute path")
        users = self._users.get(storage.mount_point)
        if users is not None:
            if user in users:
                return False
            self._reserve(storage, user)
            users.add(user)
            return True
        self._reserve(storage, user)
        try:
            if storage.driver_options and storage.driver in _SLOW:
                await self._mount_encrypted(handler, storage)
            elif storage.driver in _SLOW:
                await in_thread(partial(self._mount, handler, storage))
            else:
                self._mount(handler, storage)
        except BaseException:
            self._give_back(storage.mount_point, user)
            raise
        self._users[storage.mount_point] = {user, SANDBOX_USER} if storage.shared else {user}
        return True

    def _reserve(self, storage: agent_pb2.Storage, user: str) -> None:
        """The huge pages that this user of the storage needs, beside those of the others."""
        if storage.fstype == "hugetlbfs":
            from guest_agent.hugepages import Reservation, sizes

            page_bytes, size_bytes, _ = sizes(list(storage.options))
            self._huge_pages[storage.mount_point, user] = Reservation(page_bytes, size_bytes)

    def _give_back(self, mount_point: str, user: str) -> None:
        reservation = self._huge_pages.pop((mount_point, user), None)
        if reservation is not None:
            reservation.give_back()

    async def _mount_encrypted(self, handler: Handler, storage: agent_pb2.Storage) -> None:
        from guest_agent import encryption

        if not encryption.wanted(storage):
            return await in_thread(partial(self._mount, handler, storage))
        assert self._reaper is not None
        disk = storage.source
        async with self._encrypting:
            storage.source = await encryption.prepare(storage, self._modules, self._reaper)
        try:
            await in_thread(partial(self._mount, handler, storage))
            try:
                encryption.set_owner(storage)
            except BaseException:
                self._unmount(storage.mount_point)
                raise
        except BaseException:
            encryption.close(f"kata-py-{os.path.basename(disk)}")
            raise

    def _mount(self, handler: Handler, storage: agent_pb2.Storage) -> None:
        if not os.path.lexists(storage.mount_point):
            self._made.add(storage.mount_point)
        try:
            handler(storage)
        except BaseException:
            self._remove_made(storage.mount_point)
            raise
        try:
            if storage.HasField("fs_group"):
                set_group(
                    storage.mount_point, storage.fs_group.group_id, storage.fs_group.group_change_policy
                )
        except BaseException:
            self._unmount(storage.mount_point)
            raise

    def release(self, user: str) -> None:
        """Unmount what only `user` used, last mounted first. Raises OSError after trying all."""
        problem: OSError | None = None
        for mount_point in reversed([path for path, users in self._users.items() if user in users]):
            try:
                self._release(mount_point, user)
            except OSError as err:
                problem = problem or err
        if problem is not None:
            raise problem

    def disks_of(self, user: str) -> list[str]:
        """Mount points of the disks that only `user` uses."""
        return [path for path in self._users if path in self._on_disks and self._users[path] == {user}]

    def check_disk(self, mount_point: str) -> None:
        """Raises InvalidRequest when no disk is mounted there by a storage."""
        if mount_point not in self._on_disks:
            raise InvalidRequest(f"{mount_point} is no storage with a disk")

    def _release(self, mount_point: str, user: str) -> None:
        users = self._users[mount_point]
        users.discard(user)
        if not users:
            del self._users[mount_point]
            self._unmount(mount_point)
        self._give_back(mount_point, user)

    def _unmount(self, mount_point: str) -> None:
        self._on_disks.discard(mount_point)
        unmount(mount_point)
        self._remove_made(mount_point)

    def _remove_made(self, mount_point: str) -> None:
        """A mount point that was not there before goes, unless there is something in it."""
        if mount_point in self._made:
            self._made.remove(mount_point)
            try:
                _remove_empty(mount_point)
            except OSError as err:
                if err.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise

    def remount(self, storage: agent_pb2.Storage) -> None:
        """Change the options of an ephemeral storage. Raises InvalidRequest for any other, OSError."""
        if storage.driver != "ephemeral":
            raise InvalidRequest(
                f"only ephemeral storages can change, not {storage.driver!r} on {storage.mount_point}"
            )
        mount(
            storage.source, storage.mount_point, storage.fstype, ["remount", *_without_fsgid(storage.options)]
        )

    def _mount_as_is(self, storage: agent_pb2.Storage) -> None:
        self._modules.load_if_present(storage.fstype)
        os.makedirs(storage.mount_point, exist_ok=True)
        mount(storage.source, storage.mount_point, storage.fstype, storage.options)

    def _mount_9p(self, storage: agent_pb2.Storage) -> None:
        # The transport, which its modules do not depend on.
        self._modules.load_if_present("9pnet_virtio")
        self._mount_as_is(storage)

    def _mount_overlay(self, storage: agent_pb2.Storage) -> None:
        for option in storage.options:
            name, _, path = option.partition("=")
            if name in ("upperdir", "workdir"):
                os.makedirs(path, 0o755, exist_ok=True)
        if len(",".join(storage.options)) <= _DATA_LIMIT:
            self._mount_as_is(storage)
            return
        # Many layers: named as they are seen from where they are, by a thread with a working directory of its own.
        layers = (_option(storage.options, "lowerdir") or "").split(":")
        parent = os.path.commonpath(layers)
        short = ":".join(os.path.relpath(layer, parent) for layer in layers)
        options = [option for option in storage.options if not option.startswith("lowerdir=")]
        options.append(f"lowerdir={short}")
        if len(",".join(options)) > _DATA_LIMIT:
            raise InvalidRequest(
                f"storage {storage.mount_point}: {len(layers)} layers do not fit into one mount; use fewer"
            )
        syscalls.unshare(_CLONE_FS)
        os.chdir(parent)
        self._modules.load_if_present(storage.fstype)
        os.makedirs(storage.mount_point, exist_ok=True)
        mount(storage.source, storage.mount_point, storage.fstype, options)

    def _mount_ephemeral(self, storage: agent_pb2.Storage) -> None:
        os.makedirs(storage.mount_point, exist_ok=True)
        mount(storage.source, storage.mount_point, storage.fstype, _for_mounting(storage))
        try:
            _apply_fsgid(storage)
        except BaseException:
            unmount(storage.mount_point)
            raise

    def _make_local(self, storage: agent_pb2.Storage) -> None:
        os.makedirs(storage.mount_point, exist_ok=True)
        mode = _option(storage.options, "mode")
        if mode is not None:
            os.chmod(storage.mount_point, _number(mode, 8, storage))
        _apply_fsgid(storage)

    def _bind(self, storage: agent_pb2.Storage) -> None:
        if os.path.isdir(storage.source):
            os.makedirs(storage.mount_point, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(storage.mount_point), exist_ok=True)
            with open(storage.mount_point, "a"):
                pass
        mount(storage.source, storage.mount_point, "bind", storage.options)

    def _mount_device(self, storage: agent_pb2.Storage) -> None:
        if not storage.source.startswith("/dev/"):
            raise NotSupported(
                f"storage {storage.mount_point} by bus address {storage.source!r}; give its /dev path"
            )
        if not stat.S_ISBLK(os.stat(storage.source).st_mode):
            raise InvalidRequest(f"storage source {storage.source} is not a block device")
        try:
            self._mount_as_is(storage)
        except OSError as err:
            if err.errno == errno.ENODEV:
                raise NotSupported(
                    f"storage {storage.mount_point}: this guest's kernel has no file system {storage.fstype!r}"
                ) from err
            # Whatever the kernel thinks of what is on it: it says no more than a number.
            options = ",".join(storage.options) or "none"
            raise InvalidRequest(
                f"storage {storage.mount_point}: disk {storage.source} cannot be mounted as {storage.fstype}: "
                f"{err.strerror}; see that it has such a file system, which is whole, and that this knows the "
                f"options: {options}"
            ) from err
        self._on_disks.add(storage.mount_point)


def _spread(storages: Iterable[agent_pb2.Storage], user: str) -> list[agent_pb2.Storage]:
    """Those that are the layers of one root file system, as Kata has it, become storages of their own."""
    listed = list(storages)
    if not any(option.startswith("X-kata.") for storage in listed for option in storage.options):
        return listed
    from guest_agent import layers

    return layers.spread(listed, user)


def flush(mount_point: str) -> None:
    """Write everything to the file system's disk. May take long. Raises OSError."""
    fd = os.open(mount_point, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def set_group(path: str, group_id: int, policy: int) -> None:
    """Give a volume to a group: everything in it is the group's, writable for it, and stays so for new files."""
    root = os.lstat(path)
    fits = root.st_gid == group_id and root.st_mode & _SETGID_GROUP_BITS == _SETGID_GROUP_BITS
    if policy == _ON_ROOT_MISMATCH and fits:
        return
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            _set_group(os.path.join(directory, name), group_id)
    # Last, because it is the mark by which the work is known to be done.
    _set_group(path, group_id)


def _set_group(path: str, group_id: int) -> None:
    info = os.lstat(path)
    os.lchown(path, -1, group_id)
    if stat.S_ISDIR(info.st_mode):
        os.chmod(path, stat.S_IMODE(info.st_mode) | _SETGID_GROUP_BITS)
    elif stat.S_ISREG(info.st_mode):
        os.chmod(path, stat.S_IMODE(info.st_mode) | 0o060)


def _remove_empty(path: str) -> None:
    info = os.lstat(path)
    if stat.S_ISDIR(info.st_mode):
        os.rmdir(path)
    elif info.st_size == 0:
        os.unlink(path)


def _apply_fsgid(storage: agent_pb2.Storage) -> None:
    value = _option(storage.options, "fsgid")
    if value is not None:
        os.chown(storage.mount_point, -1, _number(value, 10, storage))
        os.chmod(storage.mount_point, 0o2775)  # noqa: S103  # what Kubernetes promises for fsGroup


def _option(options: Iterable[str], name: str) -> str | None:
    return next(
        (value for option, _, value in (word.partition("=") for word in options) if option == name), None
    )


def _without_fsgid(options: Iterable[str]) -> list[str]:
    return [option for option in options if not option.startswith("fsgid=")]


def _for_mounting(storage: agent_pb2.Storage) -> list[str]:
    if storage.fstype == "hugetlbfs":
        from guest_agent.hugepages import sizes

        # What was reserved limits it: the next user brings more.
        return sizes(list(storage.options))[2]
    return _without_fsgid(storage.options)


def _number(text: str, base: int, storage: agent_pb2.Storage) -> int:
    try:
        return int(text, base)
    except ValueError as err:
        raise InvalidRequest(f"storage {storage.mount_point}: {text!r} is not a number") from err
