"""Disks that other programs of the host serve (SPDK), in Kata's layout of the store: `block/devices/NAME` is a device
node of a number that no driver has, which containers are given, and `block/sockets/NAME` is where its program listens.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from shim.errors import InvalidRequest, NotSupported

if TYPE_CHECKING:
    from config.schema import Qemu

# By convention (SPDK with Kata); drivers of the host may have got these numbers too.
_BLK_MAJOR, _SCSI_MAJOR = 241, 242


def socket_of(major: int, minor: int, qemu: Qemu, what: str) -> Path | None:
    """The socket behind a device's number; None when the number is none of the store's. `what` is for messages.

    Raises InvalidRequest when it should be there and is not, NotSupported for a SCSI target.
    """
    if not qemu.enable_vhost_user_store or major not in (_BLK_MAJOR, _SCSI_MAJOR):
        return None
    store = Path(qemu.vhost_user_store_path) / "block"
    name = _name_of(os.makedev(major, minor), store / "devices")
    if name is None:
        if os.path.exists(f"/sys/dev/block/{major}:{minor}"):
            return None  # a driver's own
        raise InvalidRequest(
            f"{what}: no node in {store}/devices has its number, {major}:{minor}; make one, or correct "
            "vhost_user_store_path"
        )
    if major == _SCSI_MAJOR:
        raise NotSupported(
            f"{what}: {store}/devices/{name} is served as vhost-user-scsi (major {_SCSI_MAJOR}); serve it as "
            f"vhost-user-blk, with major {_BLK_MAJOR}"
        )
    path = store / "sockets" / name
    try:
        is_socket = stat.S_ISSOCK(path.stat().st_mode)
    except OSError as err:
        raise InvalidRequest(f"{what}: {path}: {err.strerror}; start the program that serves it") from err
    if not is_socket:
        raise InvalidRequest(f"{what}: {path} is no socket; see what made it")
    return path


def _name_of(number: int, folder: Path) -> str | None:
    """The first block device of that number, by its name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    for name in names:
        try:
            info = (folder / name).stat()
        except OSError:
            continue  # it has just gone
        if stat.S_ISBLK(info.st_mode) and info.st_rdev == number:
            return name
    return None
