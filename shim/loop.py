"""Loop devices: an image file as a block device, for file systems that the host itself mounts (loop(4)).

Each goes by itself with its last user: when what is on it is unmounted, also because this process was killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# linux/loop.h
_LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C82
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
# struct loop_config: descriptor and block size, struct loop_info64 (232 bytes, of which the flags are the 13th word),
# and eight reserved numbers.
_CONFIG = struct.Struct("=II52xI176x64x")
# Somebody else may take the free device that the kernel named; as many times nobody is that unlucky.
_ATTEMPTS = 64


@contextmanager
def attached(image: int, *, read_only: bool) -> Iterator[str]:
    """The path of a loop device with what the descriptor `image` is open on. It lasts for the block, and as long after
    that as somebody has mounted it.

    Raises:
        OSError: there is no loop device left, or the kernel refused.
    """
    device, path = _attach(image, read_only=read_only)
    try:
        yield path
    finally:
        os.close(device)


def _attach(image: int, *, read_only: bool) -> tuple[int, str]:
    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0)
    for _ in range(_ATTEMPTS):
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            path = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        finally:
            os.close(control)
        device = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, _CONFIG.pack(image, 0, flags))
        except OSError as err:
            os.close(device)
            if err.errno != errno.EBUSY:
                raise
        else:
            return device, path
    raise OSError(
        errno.EBUSY, "every loop device that was free was taken by somebody else", "/dev/loop-control"
    )
