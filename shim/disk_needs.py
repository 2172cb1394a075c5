"""Which of a container's root file system, mounts and devices are block devices or images of the host, and therefore
become disks of its guest.

The guest mounts what is on them: an image that was made to harm whoever mounts it meets the guest's kernel, not the
host's. Nothing is attached here; that is `shim.disks`.
"""

from __future__ import annotations

import errno
import os
import stat
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import msgspec

from agent_proto.gen import agent_pb2, oci_pb2, types_pb2
from shim import mounts
from shim.errors import InvalidRequest, NotSupported
from shim.oci import allows_every_device, is_bind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from config.schema import Qemu
    from shim.api.gen.types_pb2 import Mount as ProtoMount

# Kata's place for what storage drivers (CSI) say of volumes that a guest is to mount, one folder for each.
DIRECT_VOLUMES = "/run/kata-containers/shared/direct-volumes"
MOUNT_INFO = "mountInfo.json"
# Kata's words for a volume that is a block device of the host.
_BLOCK_VOLUMES = ("block", "blk", "directvol")
# File systems that guests have, and which live on a disk.
_ON_DISKS = frozenset({"btrfs", "erofs", "ext2", "ext3", "ext4", "f2fs", "squashfs", "vfat", "xfs"})
# Nothing says what is on a block device that is mounted as a bind: how file systems look, by the offset of their mark.
_MAGIC = (
    (1080, b"\x53\xef", "ext4"),
    (0, b"XFSB", "xfs"),
    (1024, b"\xe2\xe1\xf5\xe0", "erofs"),
)
_MAGIC_BYTES = 2048
# Options that say how the host would mount, or how the container's own mount is, and not how a file system is mounted.
_NOT_THE_GUESTS = frozenset(
    {"loop", "bind", "rbind", "private", "rprivate", "slave", "rslave", "shared", "rshared"}
)
_READ_ONLY = frozenset({"ro", "rro"})
# And options of a mount that its bind in the container has as well.
_OF_BINDS = frozenset(
    {"rw", "nosuid", "nodev", "noexec", *_READ_ONLY} | _NOT_THE_GUESTS - {"loop", "bind", "rbind"}
)
Name = Annotated[str, msgspec.Meta(max_length=4096)]


@dataclass(frozen=True, kw_only=True)
class NewImage:
    """An image that is made when it is not there yet: `name` in a folder of the host. Without a size it is as large as
    the folder's file system; its root may have the folder's owner and mode. `what` needs it, and `otherwise` is what to
    do when that is not to be had."""

    folder: str
    name: str
    what: str
    otherwise: str
    size_bytes: int = 0
    like_folder: bool = False
    blank: bool = False
    """The guest makes the file system: the image is nothing but so large."""

    @property
    def path(self) -> str:
        return f"{self.folder.rstrip('/')}/{self.name}"


@dataclass(kw_only=True)
class Need:
    """One disk: what of the host is on it. With a `container_path` the container gets the disk itself, else the guest
    mounts it: at `mount_point`, or at a place of its own, which `mount` then gets as its source."""

    path: str
    read_only: bool = False
    discard: bool = False
    container_path: str = ""
    fstype: str = ""
    options: Sequence[str] = ()
    mount_point: str = ""
    mount: oci_pb2.Mount | None = None
    fs_group: agent_pb2.FSGroup | None = None
    volume: str = ""
    """What containers mount a direct volume from."""
    served: bool = False
    """Whether `path` is the socket of a program that serves the disk."""
    image: NewImage | None = None
    """What `path` is, when it has to be made first."""
    rest_of: Need | None = None
    """The disk with the file system that this one has more of (erofs), which is the next one to have no such."""
    driver_options: Sequence[str] = ()
    whole_life: bool = False
    """It stays as long as the sandbox: what is on it would be lost when the guest forgets it."""
    place: str = ""
    """Where the guest mounts it, once that is known."""


@dataclass(kw_only=True)
class Needs:
    """All disks of a container. `devices` are entries of its specification, which the edits for the guest take out."""

    disks: list[Need] = field(default_factory=list)
    devices: list[oci_pb2.LinuxDevice] = field(default_factory=list)

    def name_devices_in(self, spec: oci_pb2.Spec) -> None:
        """Put back what is not there any more of the devices."""
        known = {device.Path for device in spec.Linux.Devices}
        spec.Linux.Devices.extend(device for device in self.devices if device.Path not in known)


class MountInfo(msgspec.Struct, frozen=True, rename={"volume_type": "volume-type"}):
    """What is said of a volume that a guest is to mount."""

    class Metadata(msgspec.Struct, frozen=True):
        """Who is to own its files; the names are Kata's."""

        fsGroup: Name = ""
        fsGroupChangePolicy: Name = ""

    volume_type: Name
    device: Name
    fstype: Name = ""
    metadata: Metadata | None = None
    options: tuple[Name, ...] | None = None


def rootfs_on_disk(
    container_id: str, rootfs: Sequence[ProtoMount], mount_point: str, qemu: Qemu, namespace: int | None
) -> Need | None:
    """The disk with the root file system, when a snapshotter has it on a block device or in an image.

    Raises NotSupported, OSError.
    """
    if len(rootfs) != 1 or rootfs[0].type not in _ON_DISKS or qemu.disable_block_device_use:
        return None
    (mount,) = rootfs
    if not _may_be_on_disk(mount.source, mount.options, namespace):
        return None
    check_driver(qemu, f"the root file system of container {container_id}")
    return _mounted(mount.source, mount.type, mount.options, mount_point=mount_point)


def devices_on_disks(spec: oci_pb2.Spec, qemu: Qemu) -> Needs:
    """The disks for the block devices among the container's devices. To be asked before the edits for the guest.

    Of a privileged container, to which an engine gives all devices of the host, these are those that it was given
    beside them: by a rule, or under another name.

    Raises InvalidRequest, NotSupported.
    """
    needs, resources = Needs(), spec.Linux.Resources
    privileged = allows_every_device(resources)
    for device in spec.Linux.Devices:
        if device.Type != "b":
            continue
        rules = [
            rule
            for rule in resources.Devices
            if rule.Allow and rule.Type == "b" and (rule.Major, rule.Minor) == (device.Major, device.Minor)
        ]
        served = _served(device, qemu)
        path = served or _device_file(device.Major, device.Minor)
        if privileged and not rules and path in (None, device.Path):
            continue
        if path is None:
            raise InvalidRequest(
                f"device {device.Path}: the host has no block device {device.Major}:{device.Minor}; run the container "
                "without it"
            )
        if qemu.disable_block_device_use:
            raise InvalidRequest(
                f"device {device.Path} cannot reach the guest: disable_block_device_use is set; remove it, or run the "
                "container without the device"
            )
        check_driver(qemu, f"device {device.Path}")
        writes = any("w" in rule.Access for rule in rules) if rules else True
        needs.disks.append(
            Need(
                path=path,
                read_only=not writes,
                container_path=device.Path,
                served=served is not None,
            )
        )
        needs.devices.append(oci_pb2.LinuxDevice.FromString(device.SerializeToString()))
    return needs


def volume_on_disk(
    mount: oci_pb2.Mount, source: str, qemu: Qemu, namespace: int | None, emptydir_mode: str = "shared-fs"
) -> Need | None:
    """The disk for a mount that is of a block device, an image, a direct volume or, as `emptydir_mode` has it, an
    `emptyDir`; None when it is of none of them, or when the host is to mount it. `source` is the mount's, as an
    absolute path.

    A device that is mounted below /dev, or has no file system, becomes a device of the container.

    Raises InvalidRequest, NotSupported, OSError.
    """
    need = _volume(mount, source, namespace)
    if need is None and emptydir_mode != "shared-fs" and is_bind(mount):
        from shim import empty_dirs

        need = empty_dirs.on_disk(mount, source, qemu, emptydir_mode, namespace)
    if need is None:
        return None
    if qemu.disable_block_device_use:
        if need.volume:
            raise InvalidRequest(
                f"volume {source} for {mount.destination} is to be mounted by the guest, and disable_block_device_use "
                "is set; remove it"
            )
        return None
    check_driver(qemu, f"volume {mount.destination}")
    if not need.container_path:
        need.mount = mount
    return need


def of_bind(options: Sequence[str]) -> list[str]:
    """Options for the container's bind of what is mounted for it with these options."""
    return ["rbind", *(option for option in options if option in _OF_BINDS)]


def direct_volume_folder(source: str) -> str:
    """Where the description of the volume is that containers mount from `source`."""
    return f"{DIRECT_VOLUMES}/{urlsafe_b64encode(source.encode()).decode()}"


def _volume(mount: oci_pb2.Mount, source: str, namespace: int | None) -> Need | None:
    if not is_bind(mount):
        on_disk = has_file_system(mount, namespace)
        return _mounted(mount.source, mount.type, mount.options) if on_disk else None
    if info := _mount_info(source):
        return _direct(info, mount, source)
    if mounts.kind_of(source, namespace=namespace) != stat.S_IFBLK:
        return None
    below_dev = mount.destination.startswith("/dev/")
    fstype = None if below_dev else _file_system_of(source, namespace)
    if fstype is None:
        read_only = not _READ_ONLY.isdisjoint(mount.options)
        return Need(path=source, read_only=read_only, container_path=mount.destination)
    return _mounted(source, fstype, mount.options)


def has_file_system(mount: oci_pb2.Mount, namespace: int | None) -> bool:
    """Whether it is a mount of a block device or an image, by the file system that is on it."""
    return mount.type in _ON_DISKS and _may_be_on_disk(mount.source, mount.options, namespace)


def mount_info_from(text: bytes) -> MountInfo:
    """A description of a volume that a guest is to mount. Raises msgspec.MsgspecError: says where it is none."""
    return msgspec.json.decode(text, type=MountInfo)


def _mount_info(source: str) -> MountInfo | None:
    path = f"{direct_volume_folder(source)}/{MOUNT_INFO}"
    try:
        with open(path, "rb") as file:
            return mount_info_from(file.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        if err.errno == errno.ENAMETOOLONG:  # no driver could have described it
            return None
        raise
    except msgspec.MsgspecError as err:
        raise InvalidRequest(f"volume {source}: {path}: {err}; see kata-py direct-volume") from err


def _direct(info: MountInfo, mount: oci_pb2.Mount, source: str) -> Need:
    if info.volume_type not in _BLOCK_VOLUMES:
        raise NotSupported(
            f"volume {source} for {mount.destination}: volume-type {info.volume_type!r}; known are block devices: block"
        )
    need = _mounted(
        info.device, info.fstype or "ext4", (*(info.options or ()), *(_READ_ONLY & {*mount.options}))
    )
    need.volume = source
    metadata = info.metadata or MountInfo.Metadata()
    if metadata.fsGroup:
        if not metadata.fsGroup.isdecimal():
            raise InvalidRequest(f"volume {source}: fsGroup {metadata.fsGroup!r} is no group id")
        on_mismatch = metadata.fsGroupChangePolicy.lower() == "onrootmismatch"
        policy = (
            types_pb2.FSGroupChangePolicy.OnRootMismatch
            if on_mismatch
            else types_pb2.FSGroupChangePolicy.Always
        )
        need.fs_group = agent_pb2.FSGroup(group_id=int(metadata.fsGroup), group_change_policy=policy)
    return need


def _mounted(path: str, fstype: str, options: Sequence[str], *, mount_point: str = "") -> Need:
    kept = [option for option in options if option not in _NOT_THE_GUESTS and option not in _READ_ONLY]
    read_only = not _READ_ONLY.isdisjoint(options)
    if fstype == "xfs":
        # Snapshots of one file system have one id, which XFS mounts only once.
        kept.append("nouuid")
    return Need(
        path=path,
        read_only=read_only,
        discard="discard" in options,
        fstype=fstype,
        options=[*kept, *(["ro"] if read_only else [])],
        mount_point=mount_point,
    )


def _may_be_on_disk(source: str, options: Sequence[str], namespace: int | None) -> bool:
    if not source.startswith("/"):
        return False
    kind = mounts.kind_of(source, namespace=namespace)
    return kind == stat.S_IFBLK or (kind == stat.S_IFREG and "loop" in options)


def check_driver(qemu: Qemu, what: str) -> None:
    """Raises NotSupported when disks of this configuration cannot be plugged in."""
    if qemu.block_device_driver == "virtio-pmem":
        raise NotSupported(
            f"{what} needs a disk, and no persistent memory is added to a running machine: set block_device_driver to "
            "virtio-blk-pci or virtio-scsi"
        )


def _served(device: oci_pb2.LinuxDevice, qemu: Qemu) -> str | None:
    """The socket of the program that serves the disk, if that is what the device stands for."""
    if not qemu.enable_vhost_user_store:
        return None
    from shim.vhost_user_store import socket_of

    path = socket_of(device.Major, device.Minor, qemu, f"device {device.Path}")
    return None if path is None else str(path)


def _device_file(major: int, minor: int) -> str | None:
    """The host's device file, by the name that its kernel gives it."""
    try:
        with open(f"/sys/dev/block/{major}:{minor}/uevent") as file:
            words = dict(line.rstrip("\n").split("=", 1) for line in file if "=" in line)
        path = f"/dev/{words['DEVNAME']}"
        info = os.stat(path)
    except (OSError, KeyError):
        return None
    found = stat.S_ISBLK(info.st_mode) and info.st_rdev == os.makedev(major, minor)
    return path if found else None


def _file_system_of(source: str, namespace: int | None) -> str | None:
    """What is on a block device, by the marks of those file systems that guests have; None for none of them."""
    fd = mounts.open_source(source, writable=False, namespace=namespace)
    try:
        head = os.pread(fd, _MAGIC_BYTES, 0)
    finally:
        os.close(fd)
    return next((name for offset, mark, name in _MAGIC if head[offset:].startswith(mark)), None)
