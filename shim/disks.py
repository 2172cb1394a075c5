"""The disks of a sandbox's guest: plugged in for the containers that need them, and out with the last of these."""

from __future__ import annotations

import asyncio
import os
import stat
from base64 import urlsafe_b64encode
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakValueDictionary

import structlog

from hypervisor.errors import HypervisorError
from hypervisor.spec import Disk, VhostUserDisk
from shim import mounts
from shim.aside import aside
from shim.disk_needs import of_bind
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Coroutine, Hashable, Mapping, Sequence

    from agent_proto.gen import agent_pb2
    from hypervisor.qemu.disk import DiskAddress
    from hypervisor.qemu.machine import Machine
    from shim.disk_needs import Need

log = structlog.get_logger()

# Where the guest mounts disks that are not a container's root, in Kata's layout.
_STORAGE_DIR = "/run/kata-containers/sandbox/storage"
# Who uses what stays as long as the sandbox; no container's id has a slash.
_SANDBOX = "/sandbox"
# A disk's time to go within a deletion; it goes on going afterwards.
_UNPLUG_LIMIT_S = 2.0


class _Attached(NamedTuple):
    """A disk that the guest has, and the containers that use it."""

    id: str
    read_only: bool
    address: DiskAddress
    users: set[str]


class Volume(NamedTuple):
    """A direct volume that the guest has: its disk, and where that is mounted there."""

    disk: str
    place: str


class Disks:
    """What is plugged in, by what is on it. `namespace` is the mount namespace that sources are looked for in."""

    def __init__(self, machine: Machine, namespace: int | None) -> None:
        self._machine = machine
        self._namespace = namespace
        self._attached: dict[Hashable, _Attached] = {}
        self._volumes: dict[str, Volume] = {}
        self._count = 0
        # One for each disk: a guest that does not let go of one delays nobody who wants another.
        self._locks: WeakValueDictionary[Hashable, asyncio.Lock] = WeakValueDictionary()
        self._leaving: set[asyncio.Task[None]] = set()

    async def attach(
        self, needs: Sequence[Need], message: agent_pb2.CreateContainerRequest
    ) -> ContainerDisks:
        """Plug in what a container needs, and name it in the request that makes the container; mounts get their sources
        in the guest. All or nothing.

        Raises InvalidRequest, HotplugRefused, QmpError, OSError.
        """
        user = message.container_id
        sources = {}
        try:
            for need in needs:
                disk, address = await self._plug(need, user)
                if need.container_path:
                    message.devices.add(
                        id=address.address, type=address.driver, container_path=need.container_path
                    )
                elif need.rest_of is not None:
                    need.rest_of.options = [*need.rest_of.options, f"device={address.address}"]
                else:
                    sources[self._add_storage(need, address, message)] = need.path
                    if need.volume:
                        self._volumes[need.volume] = Volume(disk, need.place)
        except BaseException:
            await self.release(user)
            raise
        return ContainerDisks(self, user, sources)

    def volume(self, path: str) -> Volume | None:
        """The direct volume that containers mount from that path; None when there is no such here."""
        return self._volumes.get(path)

    async def resize(self, volume: Volume, size_bytes: int) -> None:
        """Let the guest see that a disk is as large as that. Raises HotplugRefused, QmpError."""
        await self._machine.resize_disk(volume.disk, size_bytes)

    def writes(self, user: str = "") -> bool:
        """Whether something that the container (default: any) has written may not be on its disk yet. What nobody can
        read when the sandbox has ended does not count."""
        return any(
            not entry.read_only
            and _SANDBOX not in entry.users
            and (user in entry.users or (entry.users and not user))
            for entry in self._attached.values()
        )

    async def release(self, user: str) -> None:
        """Take out what only this container has used. What does not go within the time goes by itself, or with the
        machine: the log tells."""
        leaving = []
        for key, entry in list(self._attached.items()):
            entry.users.discard(user)
            if not entry.users:
                leaving.append(self._leave(self._unplug(key, entry), entry.id))
        if leaving:
            await asyncio.wait(leaving, timeout=_UNPLUG_LIMIT_S)

    async def aclose(self) -> None:
        """Stop waiting for disks to go: the machine goes."""
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    async def _plug(self, need: Need, user: str) -> tuple[str, DiskAddress]:
        """The disk's id and address."""
        if need.served:
            return await self._plug_served(need, user)
        fd = await self._open(need)
        try:
            key = _identity(fd, need)
            async with self._lock(key):  # two containers may come with the same disk at the same time
                entry = self._attached.get(key)
                if entry is None:
                    disk = Disk(
                        id=self._new_id(),
                        read_only=need.read_only,
                        shared=bool(need.container_path),
                        discard=need.discard,
                    )
                    address = await self._whole(self._plug_file(disk, os.dup(fd)), disk.id)
                    log.info("disk_plugged", source=need.path, disk=disk.id, address=address.address)
                    entry = self._attached[key] = _Attached(disk.id, disk.read_only, address, set())
                entry.users.add(user)
                if need.whole_life:
                    entry.users.add(_SANDBOX)
                return entry.id, entry.address
        finally:
            os.close(fd)

    async def _plug_file(self, disk: Disk, fd: int) -> DiskAddress:
        try:
            return await self._machine.plug_disk(disk, fd)
        finally:
            os.close(fd)

    async def _open(self, need: Need) -> int:
        if need.image is not None:
            from shim.ext4_images import open_image

            async with self._lock(("image", need.path)):  # made once, for all containers
                return await open_image(need.image, self._namespace)
        opened = partial(
            mounts.open_source, need.path, writable=not need.read_only, namespace=self._namespace
        )
        try:
            return await aside(opened, unwanted=os.close)
        except OSError as err:
            raise InvalidRequest(
                f"{need.path} cannot be a disk of the guest: {err.strerror}; correct its path, or mount it read-only "
                "if nobody may write to it"
            ) from err

    async def _plug_served(self, need: Need, user: str) -> tuple[str, DiskAddress]:
        """A disk that another program serves, which a container has to itself."""
        key = ("socket", need.path)
        async with self._lock(key):
            entry = self._attached.get(key)
            if entry is None:
                disk = VhostUserDisk(id=self._new_id(), socket=Path(need.path))
                address = await self._whole(self._machine.plug_vhost_user_disk(disk), disk.id)
                log.info("disk_plugged", source=need.path, disk=disk.id, address=address.address)
                entry = self._attached[key] = _Attached(disk.id, need.read_only, address, set())
            entry.users.add(user)
            return entry.id, entry.address

    async def _whole(self, plugging: Coroutine[None, None, DiskAddress], disk_id: str) -> DiskAddress:
        """Plug in to the end, in several steps of QEMU's: who gives up in between leaves it to be undone."""
        task = asyncio.ensure_future(plugging)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._leave(self._unwanted(task, disk_id), disk_id)
            raise

    async def _unwanted(self, plugging: asyncio.Future[DiskAddress], disk_id: str) -> None:
        try:
            await plugging
            await self._machine.unplug_disk(disk_id)
        except (HypervisorError, OSError) as err:
            log.warning("disk_not_unplugged", disk=disk_id, error=str(err))

    def _leave(self, work: Coroutine[None, None, None], disk_id: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"unplug {disk_id}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return task

    def _lock(self, key: Hashable) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    def _new_id(self) -> str:
        self._count += 1
        return f"disk{self._count}"

    async def _unplug(self, key: Hashable, entry: _Attached) -> None:
        async with self._lock(key):
            if entry.users or self._attached.get(key) is not entry:
                return  # somebody else has come for it, or has taken it out
            try:
                await self._machine.unplug_disk(entry.id)
            except HypervisorError as err:
                log.warning("disk_not_unplugged", disk=entry.id, error=str(err))
            else:
                log.info("disk_unplugged", disk=entry.id)
                del self._attached[key]
                self._volumes = {path: one for path, one in self._volumes.items() if one.disk != entry.id}

    def _add_storage(
        self, need: Need, address: DiskAddress, message: agent_pb2.CreateContainerRequest
    ) -> str:
        """Returns where it will be mounted."""
        # By its name there, as Kata has it: containers that use the same disk use the same mount.
        name = urlsafe_b64encode(address.address.encode()).decode()
        place = need.place = need.mount_point or f"{_STORAGE_DIR}/{name}"
        storage = message.storages.add(
            driver=address.driver,
            source=address.address,
            fstype=need.fstype,
            options=need.options,
            mount_point=place,
            driver_options=need.driver_options,
            shared=need.whole_life,
        )
        if need.fs_group is not None:
            storage.fs_group.CopyFrom(need.fs_group)
        if need.mount is not None:
            need.mount.source, need.mount.type = place, "bind"
            need.mount.options[:] = of_bind(need.mount.options)
        return place


def _identity(fd: int, need: Need) -> Hashable:
    """What is on the disk, and how it is used: a disk that a container has to itself is none that the guest mounts."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        what: Hashable = ("device", info.st_rdev)
    elif info.st_size == 0:
        raise InvalidRequest(f"{need.path} cannot be a disk: it is empty")
    else:
        what = ("file", info.st_dev, info.st_ino)
    return (what, need.read_only, bool(need.container_path))


class ContainerDisks:
    """The disks of one container."""

    def __init__(self, disks: Disks, container_id: str, sources: Mapping[str, str]) -> None:
        self._disks = disks
        self._id = container_id
        self._sources = sources

    @property
    def written(self) -> bool:
        """Whether something that the container has written may not be on a disk yet."""
        return self._disks.writes(self._id)

    def named(self, text: str) -> str:
        """What the guest says of a disk that it cannot mount, with the host's name for it."""
        for place, source in self._sources.items():
            text = text.replace(f"storage {place}: ", f"{source}: ")
        return text

    async def release(self) -> None:
        """Take out those that no other container uses. Harmless when repeated."""
        await self._disks.release(self._id)
