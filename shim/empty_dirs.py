"""`emptyDir` volumes on disks of the guest: an image with ext4 in the volume's directory on the host.

The image is sparse, and the guest gives back what it has freed: what a kubelet counts in the directory is what is in
use. It stays there for the next machine of the same pod, and goes when the kubelet removes the volume.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from hypervisor.errors import HostUnsupported
from hypervisor.process import spawned
from shim import mounts
from shim.disk_needs import Need
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agent_proto.gen import oci_pb2
    from config.schema import Qemu

IMAGE = "kata-disk.img"
_UNFINISHED = f"{IMAGE}.new"
_EMPTY_DIRS = re.compile(r"(/pods/[^/]+)/volumes/kubernetes\.io~empty-dir/([^/]+)/?\Z")
# Where a kubelet binds a part of a volume that a container is to have (subPath).
_PARTS = re.compile(r"(.*/pods/[^/]+)/volume-subpaths/([^/]+)/")
# The guest's kernel would write zeros over all tables of inodes, which are zeros as long as nobody has used them, and
# the host would have to keep these.
_OPTIONS = ("discard", "noinit_itable")
# As large as the host's file system, so that this is what a volume fills; ext4 has files of 16 TiB at most.
_MOST_BYTES = 8 << 40
_BLOCK_BYTES = 4096
# What is enough for a volume of one pod; as much of it as was used counts as the volume's.
_JOURNAL_MIB = 16
_PROGRAMS = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


def on_disk(mount: oci_pb2.Mount, source: str, qemu: Qemu, mode: str, namespace: int | None) -> Need | None:
    """The disk for a bind mount that is of an `emptyDir`; None for any other, and for one in memory. `mode` is
    `emptydir_mode`, of those that ask for disks.

    Raises:
        InvalidRequest: it cannot be had in that way.
        OSError: it cannot be looked at.
    """
    remedy = "set emptydir_mode of [runtime] to shared-fs, or give the volume medium: Memory"
    if part := _PARTS.match(source):
        volume = f"{part[1]}/volumes/kubernetes.io~empty-dir/{part[2]}"
        if _is_on_disk(volume, namespace):
            raise InvalidRequest(
                f"emptyDir {part[2]}: it is on a disk of the guest by emptydir_mode, and {mount.destination} is to be "
                f"a part of it (subPath), which the host cannot see; {remedy}"
            )
        return None
    found = _EMPTY_DIRS.search(source)
    if found is None or not _is_on_disk(source, namespace):
        return None
    what = f"emptyDir {found[2]}: emptydir_mode asks for"
    if mode == "block-encrypted":
        raise InvalidRequest(
            f"{what} an encrypted disk of the guest, which no guest of this version has, and it would be readable on "
            f"the host; {remedy}"
        )
    if qemu.disable_block_device_use:
        raise InvalidRequest(
            f"{what} a disk of the guest, and disable_block_device_use is set; remove that, or {remedy}"
        )
    return Need(
        path=f"{source.rstrip('/')}/{IMAGE}",
        discard=True,
        fstype="ext4",
        options=_OPTIONS,
        empty_dir=source,
    )


async def open_image(folder: str, namespace: int | None) -> int:
    """The image of the `emptyDir` at `folder`, which is made when it is not there yet: a descriptor to be closed by the
    caller. Who may use the volume is as for the folder.

    Raises:
        InvalidRequest: there is something else in its place.
        HostUnsupported: the programs are missing that make it.
        OSError: it cannot be made.
    """
    directory = mounts.open_directory(folder, namespace=namespace)
    try:
        if (image := _opened(directory, folder)) is not None:
            return image
        await _make(directory, folder)
        image = _opened(directory, folder)
    finally:
        os.close(directory)
    if image is None:
        raise FileNotFoundError(errno.ENOENT, "it has been removed meanwhile", f"{folder}/{IMAGE}")
    return image


def _is_on_disk(folder: str, namespace: int | None) -> bool:
    try:
        directory = mounts.open_directory(folder, namespace=namespace)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not mounts.in_memory(f"/proc/self/fd/{directory}")
    finally:
        os.close(directory)


def _opened(directory: int, folder: str) -> int | None:
    try:
        # Not waiting: it might be a FIFO.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        image = os.open(IMAGE, flags, dir_fd=directory)
    except FileNotFoundError:
        return None
    info = os.fstat(image)
    if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and info.st_nlink == 1:
        return image
    os.close(image)
    raise InvalidRequest(f"{folder}/{IMAGE} is not the image that kata-py makes for an emptyDir; remove it")


async def _make(directory: int, folder: str) -> None:
    """Under another name at first: what has been left behind half-made is made anew."""
    with suppress(FileNotFoundError):
        os.unlink(_UNFINISHED, dir_fd=directory)
    image = os.open(_UNFINISHED, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        room, owner = os.fstatvfs(directory), os.fstat(directory)
        size = min(room.f_blocks * room.f_frsize, _MOST_BYTES)
        os.ftruncate(image, size - size % _BLOCK_BYTES)
        path = f"/proc/self/fd/{image}"
        extended = (
            f"nodiscard,lazy_itable_init=1,lazy_journal_init=1,root_owner={owner.st_uid}:{owner.st_gid}"
        )
        await _run(
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", str(_BLOCK_BYTES), "-J", f"size={_JOURNAL_MIB}",
             "-E", extended, path], image, folder,
        )  # fmt: skip
        # What mkfs.ext4 cannot be told everywhere: the mode of the root, which is to be empty.
        mode = stat.S_IFDIR | stat.S_IMODE(owner.st_mode)
        for command in (f"set_inode_field <2> mode 0{mode:o}", "rmdir lost+found"):
            await _run(["debugfs", "-w", "-R", command, path], image, folder)
        os.rename(_UNFINISHED, IMAGE, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(_UNFINISHED, dir_fd=directory)
        raise
    finally:
        os.close(image)


async def _run(argv: Sequence[str], image: int, folder: str) -> None:
    program = shutil.which(argv[0], path=_PROGRAMS)
    if program is None:
        raise HostUnsupported(
            f"{argv[0]} is missing, which makes the disk of emptyDir {folder}; install e2fsprogs, or set "
            "emptydir_mode of [runtime] to shared-fs"
        )
    async with spawned([program, *argv[1:]], fds=[image]) as process:
        end = await process.wait()
    if end.status != 0:
        raise OSError(
            errno.EIO,
            f"cannot make the disk of an emptyDir: {argv[0]}: {end}: {process.output_tail()[-1:]}",
            folder,
        )
