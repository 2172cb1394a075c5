"""Disks that nobody but this guest can read: what is written to them is encrypted (dm-crypt) with a key that the guest
makes, and which is nowhere but in its kernel. It needs no header on the disk: the next guest starts anew.
"""

from __future__ import annotations

import fcntl
import os
import struct
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from guest_agent.errors import InvalidRequest, NotSupported
from guest_agent.spawn import aside, in_thread

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agent_proto.gen import agent_pb2
    from guest_agent.modules import Modules
    from guest_agent.reaper import Reaper

KEY, MAKE = "encryption_key", "create_filesystem"
#: Of kata-py's own: who may use the volume.
OWNER, MODE = "root_owner", "root_mode"
PROGRAMS = "/usr/lib/kata-py/programs"
_UNPACKED = "/run/kata-py/programs"
_CONTROL = "/dev/mapper/control"
#: linux/dm-ioctl.h: struct dm_ioctl, struct dm_target_spec, the numbers of the calls, and what wipes their memory.
_IOCTL = struct.Struct("=3I2IIiIIIQ128s129s7x")
_TARGET = struct.Struct("=QQiI16s")
_CREATE, _REMOVE, _SUSPEND, _LOAD = (0xC138FD00 | number for number in (3, 4, 6, 9))
_SECURE_DATA = 1 << 15
_KEY_BYTES = 64
_SECTOR_BYTES = 512
#: What encrypts by the processor's own instructions.
_FAST = ("aesni_intel", "aes_ce_blk", "aes_s390")
_CIPHER = "aes-xts-plain64"
_FEATURES = (
    "has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,metadata_csum"
)
#: As of any disk for a pod's files. Without a file of the machine's, mke2fs has no words of its own.
_MAKE = (
    "-q", "-F", "-m", "0", "-b", "4096", "-i", "16384", "-I", "256", "-J", "size=16", "-O", _FEATURES,
    "-E", "lazy_itable_init=1,lazy_journal_init=1",
)  # fmt: skip


def wanted(storage: agent_pb2.Storage) -> bool:
    """Whether a storage is such a disk. Raises InvalidRequest, NotSupported for words that mean something else."""
    words = _words(storage)
    if not words:
        return False
    if words.get(KEY) != "ephemeral" or MAKE not in words or storage.fstype != "ext4":
        raise NotSupported(
            f"storage {storage.mount_point}: {', '.join(storage.driver_options)}; known is a disk with ext4 that is "
            f"made anew with a key of the guest's: {KEY}=ephemeral, {MAKE}"
        )
    return True


async def prepare(storage: agent_pb2.Storage, modules: Modules, reaper: Reaper) -> str:
    """The device to mount in the place of the disk, with an empty file system on it. Raises InvalidRequest, OSError."""
    for name in ("dm_mod", "dm_crypt", "xts", "ecb"):
        modules.load_if_present(name)
    for name in _FAST:
        with suppress(OSError):  # this processor has no such instructions
            modules.load_if_present(name)
    name = f"kata-py-{os.path.basename(storage.source)}"
    device = await in_thread(partial(_open, name, storage.source))
    try:
        program, environment = await in_thread(_unpacked)
        await aside(reaper, partial(os.execve, program, [program, *_MAKE, device], environment))
    except BaseException as err:
        close(name)
        if isinstance(err, OSError):
            raise InvalidRequest(
                f"storage {storage.mount_point}: no file system can be made on disk {storage.source}: mke2fs ended "
                f"with {err.errno}; the guest's console says more"
            ) from err
        raise
    return device


def set_owner(storage: agent_pb2.Storage) -> None:
    """The root of a new file system: empty, and whose the host says. Raises InvalidRequest, OSError."""
    words = _words(storage)
    try:
        uid, gid = (int(word) for word in words.get(OWNER, "0:0").split(":"))
        mode = int(words.get(MODE, "777"), 8)
    except ValueError as err:
        raise InvalidRequest(f"storage {storage.mount_point}: {', '.join(storage.driver_options)}") from err
    os.rmdir(f"{storage.mount_point}/lost+found")
    os.chown(storage.mount_point, uid, gid)
    os.chmod(storage.mount_point, mode & 0o7777)


def close(name: str) -> None:
    """Forget a disk, and with it the key. Raises OSError."""
    _call(_REMOVE, name)


def _words(storage: agent_pb2.Storage) -> Mapping[str, str]:
    return dict(option.partition("=")[::2] for option in storage.driver_options)


def _open(name: str, disk: str) -> str:
    fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sectors = os.lseek(fd, 0, os.SEEK_END) // _SECTOR_BYTES
    finally:
        os.close(fd)
    (number,) = _IOCTL.unpack_from(_call(_CREATE, name))[10:11]
    try:
        # What is freed is given back to the host: it learns how much is used, and nothing of what it is.
        key = os.getrandom(_KEY_BYTES).hex()
        _call(_LOAD, name, _target(sectors, f"{_CIPHER} {key} 0 {disk} 0 1 allow_discards"))
        _call(_SUSPEND, name)  # without its flag it is the beginning
    except BaseException:
        close(name)
        raise
    return f"/dev/dm-{number & 0xFF | number >> 12 & ~0xFF}"


def _target(sectors: int, parameters: str) -> bytes:
    text = parameters.encode() + b"\0"
    text += bytes(-len(text) % 8)
    return _TARGET.pack(0, sectors, 0, _TARGET.size + len(text), b"crypt") + text


def _call(command: int, name: str, target: bytes = b"") -> bytearray:
    size = _IOCTL.size + len(target)
    words = (4, 0, 0, size, _IOCTL.size, 1 if target else 0, 0, _SECURE_DATA, 0, 0, 0, name.encode(), b"")
    data = bytearray(_IOCTL.pack(*words) + target)
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, command, data)
    finally:
        os.close(control)
    return data


def _unpacked() -> tuple[str, dict[str, str]]:
    """mke2fs, and what it is to be started with; it is in the image compressed."""
    import zlib

    source, folder = f"{PROGRAMS}/mke2fs", f"{_UNPACKED}/mke2fs"
    if not os.path.isdir(folder):
        unfinished = f"{folder}.new"
        os.makedirs(unfinished, exist_ok=True)
        for name in os.listdir(source):
            with open(f"{source}/{name}", "rb") as packed:
                data = zlib.decompress(packed.read())
            target = os.open(
                f"{unfinished}/{name.removesuffix('.z')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o755
            )
            with open(target, "wb") as file:
                file.write(data)
        os.rename(unfinished, folder)
    return f"{folder}/mke2fs", {"LD_LIBRARY_PATH": folder, "MKE2FS_CONFIG": "/dev/null"}
