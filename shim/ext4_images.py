"""Images with an empty ext4, which are made when a guest first needs them: of `emptyDir` volumes, and of what
containers write to their root file systems.

They are sparse, and the guest gives back what it has freed.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from hypervisor.errors import HostUnsupported
from hypervisor.process import spawned
from shim import mounts
from shim.aside import aside
from shim.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shim.disk_needs import NewImage

# The guest's kernel would write zeros over all tables of inodes, which are zeros as long as nobody has used them, and
# the host would have to keep these.
OPTIONS = ("discard", "noinit_itable")
# As large as the host's file system, so that this is what it fills; ext4 has files of 16 TiB at most.
_MOST_BYTES = 8 << 40
_BLOCK_BYTES = 4096
# What is enough for the files of one container or pod; as much of it as was used counts as used.
_JOURNAL_MIB = 16
_PROGRAMS = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin"


async def open_image(new: NewImage, namespace: int | None) -> int:
    """The image, which is made when it is not there yet: a descriptor to be closed by the caller.

    Raises:
        InvalidRequest: there is something else in its place.
        HostUnsupported: the programs are missing that make it.
        OSError: it cannot be made.
    """
    opened = partial(mounts.open_directory, new.folder, namespace=namespace)
    directory = await aside(opened, unwanted=os.close)
    try:
        if (image := _opened(directory, new)) is not None:
            return image
        await _make(directory, new)
        image = _opened(directory, new)
    finally:
        os.close(directory)
    if image is None:
        raise FileNotFoundError(errno.ENOENT, "it has been removed meanwhile", new.path)
    return image


def _opened(directory: int, new: NewImage) -> int | None:
    try:
        # Not waiting: it might be a FIFO.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        image = os.open(new.name, flags, dir_fd=directory)
    except FileNotFoundError:
        return None
    info = os.fstat(image)
    if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid() and info.st_nlink == 1:
        return image
    os.close(image)
    raise InvalidRequest(f"{new.path} is not the image that kata-py makes for {new.what}; remove it")


async def _make(directory: int, new: NewImage) -> None:
    """Under another name at first: what has been left behind half-made is made anew."""
    unfinished = f"{new.name}.new"
    with suppress(FileNotFoundError):
        os.unlink(unfinished, dir_fd=directory)
    image = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        room, owner = os.fstatvfs(directory), os.fstat(directory)
        size = new.size_bytes or min(room.f_blocks * room.f_frsize, _MOST_BYTES)
        os.ftruncate(image, size - size % _BLOCK_BYTES)
        if new.blank:
            os.rename(unfinished, new.name, src_dir_fd=directory, dst_dir_fd=directory)
            return
        path = f"/proc/self/fd/{image}"
        extended = "nodiscard,lazy_itable_init=1,lazy_journal_init=1"
        if new.like_folder:
            extended += f",root_owner={owner.st_uid}:{owner.st_gid}"
        await _run(
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-b", str(_BLOCK_BYTES), "-J", f"size={_JOURNAL_MIB}",
             "-E", extended, path], image, new,
        )  # fmt: skip
        if new.like_folder:
            # What mkfs.ext4 cannot be told everywhere: the mode of the root, which is to be empty.
            mode = stat.S_IFDIR | stat.S_IMODE(owner.st_mode)
            for command in (f"set_inode_field <2> mode 0{mode:o}", "rmdir lost+found"):
                await _run(["debugfs", "-w", "-R", command, path], image, new)
        os.rename(unfinished, new.name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.unlink(unfinished, dir_fd=directory)
        raise
    finally:
        os.close(image)


async def _run(argv: Sequence[str], image: int, new: NewImage) -> None:
    program = shutil.which(argv[0], path=_PROGRAMS)
    if program is None:
        raise HostUnsupported(
            f"{argv[0]} is missing, which makes the disk of {new.what}; install e2fsprogs, or {new.otherwise}"
        )
    async with spawned([program, *argv[1:]], fds=[image]) as process:
        end = await process.wait()
    if end.status != 0:
        raise OSError(
            errno.EIO,
            f"cannot make the disk of {new.what}: {argv[0]}: {end}: {process.output_tail()[-1:]}",
            new.folder,
        )
