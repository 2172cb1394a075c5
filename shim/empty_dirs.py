"""`emptyDir` volumes on disks of the guest: an image with ext4 in the volume's directory on the host.

The image is sparse, and the guest gives back what it has freed: what a kubelet counts in the directory is what is in
use. It stays there for the next machine of the same pod, unless it is encrypted, and goes when the kubelet removes the
volume.
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

from shim import mounts
from shim.disk_needs import Need, NewImage
from shim.errors import InvalidRequest
from shim.ext4_images import OPTIONS

if TYPE_CHECKING:
    from agent_proto.gen import oci_pb2
    from config.schema import Qemu

IMAGE = "kata-disk.img"
_EMPTY_DIRS = re.compile(r"(/pods/[^/]+)/volumes/kubernetes\.io~empty-dir/([^/]+)/?\Z")
# Where a kubelet binds a part of a volume that a container is to have (subPath).
_PARTS = re.compile(r"(.*/pods/[^/]+)/volume-subpaths/([^/]+)/")


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
    if qemu.disable_block_device_use:
        raise InvalidRequest(
            f"{what} a disk of the guest, and disable_block_device_use is set; remove that, or {remedy}"
        )
    image = NewImage(
        folder=source,
        name=IMAGE,
        what=f"emptyDir {source}",
        otherwise="set emptydir_mode of [runtime] to shared-fs",
        like_folder=mode == "block-plain",
        blank=mode == "block-encrypted",
    )
    need = Need(path=image.path, discard=True, fstype="ext4", options=OPTIONS, image=image)
    if image.blank:
        # The key is the guest's, and goes with it. So does the file system, which therefore the guest makes.
        owner, permissions = _owner(source, namespace)
        need.driver_options = (
            "encryption_key=ephemeral",
            "create_filesystem",
            f"root_owner={owner}",
            f"root_mode={permissions:o}",
        )
        need.whole_life = True
    return need


def _owner(folder: str, namespace: int | None) -> tuple[str, int]:
    directory = mounts.open_directory(folder, namespace=namespace)
    try:
        info = os.fstat(directory)
    finally:
        os.close(directory)
    return f"{info.st_uid}:{info.st_gid}", stat.S_IMODE(info.st_mode)


def _is_on_disk(folder: str, namespace: int | None) -> bool:
    try:
        directory = mounts.open_directory(folder, namespace=namespace)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        return not mounts.in_memory(f"/proc/self/fd/{directory}")
    finally:
        os.close(directory)
