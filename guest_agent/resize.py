"""File systems that grow with their disks while they are mounted: the kernel does it, by a call for each kind."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from guest_agent.errors import InvalidRequest, NotSupported

#: ext4's takes the number of blocks, XFS' that and the share that inodes may have, which stays as it is.
_EXT4_IOC_RESIZE_FS = 0x40086610
_XFS_IOC_FSGEOMETRY_V1, _XFS_IOC_FSGROWFSDATA = 0x80705864, 0x4010586E
_XFS_GEOMETRY_BYTES = 112
_SECTOR_BYTES = 512


class Disk:
    """The disk that is mounted at a path."""

    def __init__(self, mount_point: str, *, sys: str = "/sys") -> None:
        self._mount_point = mount_point
        device = os.stat(mount_point).st_dev
        self._folder = f"{sys}/dev/block/{os.major(device)}:{os.minor(device)}"

    @property
    def size_bytes(self) -> int:
        """As the kernel knows it. Raises OSError."""
        with open(f"{self._folder}/size") as file:
            return int(file.read()) * _SECTOR_BYTES

    def look_again(self) -> None:
        """A SCSI disk is asked for its size only when somebody wants that. Raises OSError."""
        try:
            # Not created: in such a folder that would be forbidden.
            file = os.open(f"{self._folder}/device/rescan", os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return  # virtio tells of its size by itself
        try:
            os.write(file, b"1")
        finally:
            os.close(file)

    def grow(self, size_bytes: int) -> None:
        """Let the file system have so much of the disk; one that is as large already stays as it is. It may take long.

        Raises InvalidRequest, NotSupported, OSError.
        """
        info = os.statvfs(self._mount_point)
        block_bytes = info.f_frsize
        if size_bytes < info.f_blocks * block_bytes:
            raise InvalidRequest(
                f"volume {self._mount_point}: it has {info.f_blocks * block_bytes} bytes for files, and does not "
                f"shrink to {size_bytes}"
            )
        kind = self._file_system()
        folder = os.open(self._mount_point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if kind == "ext4":
                fcntl.ioctl(folder, _EXT4_IOC_RESIZE_FS, struct.pack("=Q", size_bytes // block_bytes))
            elif kind == "xfs":
                geometry = bytearray(_XFS_GEOMETRY_BYTES)
                fcntl.ioctl(folder, _XFS_IOC_FSGEOMETRY_V1, geometry)
                # The eighth word of struct xfs_fsop_geom_v1.
                (percent,) = struct.unpack_from("=I", geometry, 28)
                blocks = size_bytes // block_bytes
                fcntl.ioctl(folder, _XFS_IOC_FSGROWFSDATA, struct.pack("=QI4x", blocks, percent))
            else:
                raise NotSupported(f"volume {self._mount_point}: {kind} does not grow while it is mounted")
        except OSError as err:
            if err.errno not in (errno.EINVAL, errno.ENOSPC):
                raise
            raise InvalidRequest(
                f"volume {self._mount_point}: {kind} does not become {size_bytes} bytes large: {err.strerror}; it only "
                "grows, and no further than its disk"
            ) from err
        finally:
            os.close(folder)

    def _file_system(self) -> str:
        with open("/proc/self/mountinfo") as file:
            for line in reversed(file.readlines()):
                left, _, right = line.partition(" - ")
                if left.split(" ", 5)[4] == self._mount_point:
                    return right.split(" ", 1)[0]
        raise InvalidRequest(f"nothing is mounted at {self._mount_point}")
