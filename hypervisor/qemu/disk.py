"""Disks that come and go while the machine runs: virtio disks, or disks of the machine's SCSI controller.

What is on a disk is opened by the caller, in the mount namespace that knows its path, and handed over as a descriptor:
QEMU needs no right to open it, whoever it runs as.
"""

from __future__ import annotations

import asyncio
import os
import stat
from itertools import count
from typing import TYPE_CHECKING, Literal, NamedTuple

import structlog

from hypervisor.arch import arch_named
from hypervisor.errors import HotplugRefused, HypervisorError, QmpRefused
from hypervisor.qemu import commands
from hypervisor.qemu.disk_places import places

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from hypervisor.qemu.bridge import Place
    from hypervisor.qemu.qmp import Monitor
    from hypervisor.spec import Disk, VhostUserDisk, VmSpec

log = structlog.get_logger(__name__)

_SCSI_BUS = "scsi0.0"
# Kata's numbering: 256 units at each of 256 targets.
_UNITS = 256
_SCSI_DISKS = 256 * _UNITS
# Numbers on the channels' virtual subsystem, far above those that QEMU gives to what a machine starts with.
_FIRST_CHANNEL = 0x1000
_CHANNELS = 0x1000
# QEMU lets go of a disk's backend some moments after it has told that the disk is gone, when all its threads have seen
# that (RCU); no event tells of it.
_LETTING_GO_S = 5.0
_LETTING_GO_PAUSE_S = 0.02


class DiskAddress(NamedTuple):
    """Where the guest finds a disk, in the words of Kata's agent: a PCI path (`02/01`), `target:unit`, or a channel's
    number (`0.0.1000`)."""

    driver: Literal["blk", "scsi", "blk-ccw"]
    address: str


class _Spot(NamedTuple):
    """One place in the machine: the device's type and what belongs to its bus. `address` is empty when only QEMU knows
    it."""

    driver: str
    properties: dict[str, object]
    kind: Literal["blk", "scsi", "blk-ccw"]
    address: str


class _Plugged(NamedTuple):
    """A disk that is there: its number among those of its kind, and its set of descriptors, unless another program
    serves it."""

    number: int
    taken: set[int]
    fdset: int | None


class Disks:
    """The disks that were plugged into a running machine, and what is left for more."""

    def __init__(self, spec: VmSpec) -> None:
        self._spec = spec
        self._arch = arch_named(spec.arch)
        self._places: list[Place] = places(self._arch) if spec.disk_places else []
        self._plugged: dict[str, _Plugged] = {}
        self._taken: set[int] = set()
        # With a SCSI controller only disks that other programs serve take places.
        self._taken_places: set[int] = set() if spec.scsi else self._taken

    async def plug(self, monitor: Monitor, disk: Disk, fd: int) -> DiskAddress:
        """Give the guest one more disk, with what `fd` is open on; `fd` stays the caller's.

        Raises HotplugRefused, QmpError; OSError when `fd` is of neither a block device nor a regular file.
        """
        number = self._free_number(disk)
        self._taken.add(number)
        try:
            spot = self._spot(number)
            fdset = await self._add(monitor, disk, fd, spot)
        except BaseException:
            self._taken.discard(number)
            raise
        self._plugged[disk.id] = _Plugged(number, self._taken, fdset)
        return DiskAddress(spot.kind, spot.address or await self._pci_address(monitor, disk.id))

    async def plug_vhost_user(self, monitor: Monitor, disk: VhostUserDisk) -> DiskAddress:
        """Give the guest a disk that another program serves. Raises HotplugRefused, QmpError."""
        from hypervisor.qemu import vhost_user_disk

        number = self._free_place(disk)
        place = self._places[number]
        properties: dict[str, object] = {
            "bus": place.bus,
            "addr": f"{place.slot:02x}",
            "disable-legacy": "on",
            # As many as it has processors, if it is not told; few programs serve as many.
            "num-queues": self._spec.disk_queues or 1,
        }
        if self._spec.disk_queue_size is not None:
            properties["queue-size"] = self._spec.disk_queue_size
        self._taken_places.add(number)
        try:
            await vhost_user_disk.add(
                monitor, disk, properties, reconnect_s=self._spec.vhost_user_reconnect_s
            )
        except BaseException:
            self._taken_places.discard(number)
            raise
        self._plugged[disk.id] = _Plugged(number, self._taken_places, None)
        return DiskAddress("blk", await self._pci_address(monitor, disk.id))

    async def _pci_address(self, monitor: Monitor, disk_id: str) -> str:
        """Where the guest finds a disk that was plugged in just now; without that it is of no use, and is taken out."""
        try:
            path = commands.pci_path(await commands.query_pci(monitor), disk_id)
            if path is None:
                raise HotplugRefused(f"disk {disk_id} is not on the bus that it was plugged into")
        except BaseException:
            await _quietly(self.unplug(monitor, disk_id))
            raise
        return path

    async def unplug(self, monitor: Monitor, disk_id: str) -> None:
        """Take a disk away; nothing happens when it is not there. Raises HotplugRefused, QmpError.

        One that could not be taken away keeps its place, and may be tried again.
        """
        plugged = self._plugged.get(disk_id)
        if plugged is None:
            return
        if plugged.fdset is None:
            from hypervisor.qemu import vhost_user_disk

            await vhost_user_disk.remove(monitor, disk_id)
        else:
            await commands.unplug(monitor, disk_id)
            await _release(monitor, disk_id, plugged.fdset)
        self._plugged.pop(disk_id, None)
        plugged.taken.discard(plugged.number)

    async def resize(self, monitor: Monitor, disk_id: str, size_bytes: int) -> None:
        """Let the guest see another size: a file becomes as large as that, a block device has to be it already.

        Raises HotplugRefused, QmpError.
        """
        before = await commands.block_bytes(monitor, disk_id)
        if before is not None and size_bytes < before:
            # QEMU would cut off the end of a file, with what is there.
            raise HotplugRefused(
                f"cannot make disk {disk_id} {size_bytes} bytes large: it has {before}, and only grows"
            )
        try:
            await commands.block_resize(monitor, disk_id, size_bytes)
        except QmpRefused as err:
            raise HotplugRefused(
                f"cannot make disk {disk_id} {size_bytes} bytes large: {err}; make what is on it so large first"
            ) from err

    def _free_place(self, disk: VhostUserDisk) -> int:
        for number in range(len(self._places)):
            if number not in self._taken_places:
                return number
        why = "all places for disks are taken" if self._places else "the machine was made without places"
        raise HotplugRefused(f"cannot plug in disk {disk.id}: {why}; it needs one on a PCI bus")

    def _free_number(self, disk: Disk) -> int:
        if self._spec.scsi:
            room, remedy = _SCSI_DISKS, "it is the most that its controller has"
        elif not self._spec.disk_places:
            raise HotplugRefused(
                f"cannot plug in disk {disk.id}: the machine was made without places for disks; "
                "set disable_block_device_use to false, and block_device_driver to virtio-blk-pci or virtio-scsi"
            )
        elif self._arch.devices.bus == "ccw":
            room, remedy = _CHANNELS, "it is the most that a machine takes"
        else:
            room, remedy = (
                len(self._places),
                "set block_device_driver to virtio-scsi, which has places for more",
            )
        for number in range(room):
            if number not in self._taken:
                return number
        raise HotplugRefused(
            f"cannot plug in disk {disk.id}: all {room} places for disks are taken; {remedy}"
        )

    def _spot(self, number: int) -> _Spot:
        if self._spec.scsi:
            target, unit = divmod(number, _UNITS)
            properties = {"bus": _SCSI_BUS, "scsi-id": target, "lun": unit}
            return _Spot("scsi-hd", properties, "scsi", f"{target}:{unit}")
        driver, common = self._arch.devices.block, self._virtio(number)
        if self._arch.devices.bus == "ccw":
            channel = f"{_FIRST_CHANNEL + number:04x}"
            if self._spec.iommu_platform:
                common["iommu_platform"] = True
            return _Spot(driver, {"devno": f"fe.0.{channel}", **common}, "blk-ccw", f"0.0.{channel}")
        place = self._places[number]
        # Without its old form, which would take I/O ports, of which a bridge has few.
        bus = {"bus": place.bus, "addr": f"{place.slot:02x}", "disable-legacy": "on"}
        return _Spot(driver, {**bus, **common}, "blk", "")

    def _virtio(self, number: int) -> dict[str, object]:
        spec = self._spec
        words: dict[str, object] = {}
        if spec.disk_queue_size is not None:
            words["queue-size"] = spec.disk_queue_size
        if spec.disk_queues is not None:
            words["num-queues"] = spec.disk_queues
        if spec.spare_iothreads:
            words["iothread"] = f"spare-io{number % spec.spare_iothreads}"
        return words

    async def _add(self, monitor: Monitor, disk: Disk, fd: int, spot: _Spot) -> int:
        driver = _driver_for(fd, disk)
        fdset = await commands.add_fd(monitor, fd, disk.id)
        try:
            await commands.blockdev_add(monitor, driver, disk.id, self._backend(disk, fdset))
        except HypervisorError as err:
            await _quietly(commands.remove_fd(monitor, fdset))
            if isinstance(err, QmpRefused):
                raise HotplugRefused(
                    f"cannot plug in disk {disk.id}: {err}; see that no other machine uses it"
                ) from err
            raise
        properties = {**spot.properties, "drive": disk.id, **self._sizes()}
        if disk.shared:
            properties["share-rw"] = True
        try:
            await commands.device_add(monitor, spot.driver, disk.id, properties)
        except HypervisorError as err:
            await _quietly(_release(monitor, disk.id, fdset))
            if isinstance(err, QmpRefused):
                raise HotplugRefused(f"cannot plug in disk {disk.id}: {err}") from err
            raise
        return fdset

    def _backend(self, disk: Disk, fdset: int) -> dict[str, object]:
        spec = self._spec
        words: dict[str, object] = {"filename": f"/dev/fdset/{fdset}", "read-only": disk.read_only}
        if spec.disk_aio is not None:
            words["aio"] = spec.disk_aio
        cache = {"direct": spec.disk_cache_direct, "no-flush": spec.disk_cache_no_flush}
        if wanted := {name: value for name, value in cache.items() if value is not None}:
            words["cache"] = wanted
        if disk.discard and not disk.read_only:
            words["discard"] = "unmap"
        return words

    def _sizes(self) -> dict[str, object]:
        spec = self._spec
        sizes = {
            "logical_block_size": spec.disk_logical_sector_bytes,
            "physical_block_size": spec.disk_physical_sector_bytes,
        }
        return {name: size for name, size in sizes.items() if size is not None}


def _driver_for(fd: int, disk: Disk) -> str:
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        return "host_device"
    if stat.S_ISREG(mode):
        return "file"
    raise HotplugRefused(
        f"cannot plug in disk {disk.id}: what is to be on it is neither a block device nor a regular file"
    )


async def _release(monitor: Monitor, node: str, fdset: int) -> None:
    """Close what a disk was on, once QEMU uses it no more. Raises HotplugRefused, QmpError."""
    for attempt in count():
        try:
            await commands.blockdev_del(monitor, node)
            break
        except QmpRefused as err:
            if attempt * _LETTING_GO_PAUSE_S >= _LETTING_GO_S:
                raise HotplugRefused(f"disk {node} is unplugged, and QEMU keeps it open: {err}") from err
            await asyncio.sleep(_LETTING_GO_PAUSE_S)
    await commands.remove_fd(monitor, fdset)


async def _quietly(step: Coroutine[None, None, None]) -> None:
    """A step of undoing; the error that it is for is the one to be told."""
    try:
        await step
    except HypervisorError as err:
        log.warning("disk_not_undone", error=str(err))
