"""A root image: the guest's tree as a read-only disk, and the small initrd with which our kernel mounts it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from guest_image.disk import disk
from guest_image.errors import ImageError
from guest_image.file_systems import FileSystem, file_system
from guest_image.hash_tree import hash_tree
from guest_image.image_initrd import image_initrd

if TYPE_CHECKING:
    from guest_image.cpio import Tree
    from guest_image.kernel import ModuleDirectory
    from guest_image.tools import Root

#: Programs that run during the build.
TOOLS = ("e2fsprogs", "erofs-utils")
#: Whose guests were booted from one. The kernel of s390x has checksums and hashes as modules, which nothing loads here.
ARCHITECTURES = ("amd64", "arm64")
#: Programs of the small initrd.
PROGRAMS = ("busybox-static", "dmsetup")


@dataclass(frozen=True)
class RootImage:
    """The files, and the value of `kernel_verity_params` when there are hashes."""

    disk: bytes
    initrd: bytes
    verity: str


def check(kind: FileSystem | str | None, arch: str, *, verity: bool) -> None:
    """Raises ImageError for what cannot be built."""
    if kind is not None and arch not in ARCHITECTURES:
        known = " and ".join(ARCHITECTURES)
        raise ImageError(
            f"no root image for {arch}: they are made for {known}; leave it out, there is an initrd"
        )
    if kind is not None and kind not in get_args(FileSystem):
        known = ", ".join(get_args(FileSystem))
        raise ImageError(f"no root image with file system {kind!r}: known are {known}")
    if verity and kind is None:
        raise ImageError(
            "verity is of a root image, and an initrd has none; name a file system for the image"
        )


def root_image(
    kind: FileSystem,
    tree: Tree,
    *,
    verity: bool,
    seed: bytes,
    modules: ModuleDirectory,
    tools: Root,
    programs: Root,
) -> RootImage:
    """Everything at once, in memory but for what the programs need. `seed` stands for the tree's contents: the image's
    identifiers and the salt of its hashes are made from it. Raises ImageError.
    """
    with tempfile.TemporaryDirectory(prefix="kata-py-guest-") as work:
        check_room(Path(work), 2 * sum(len(entry.data) for _, entry in tree))
        data = file_system(kind, tree, seed, tools, Path(work))
    partitions, parameters = [data], ""
    if verity:
        hashes = hash_tree(data, salt=seed)
        partitions.append(hashes.blocks)
        parameters = hashes.parameters()
    initrd = image_initrd(kind, arch=programs.arch, verity=verity, modules=modules, packages=programs)
    return RootImage(disk(partitions), initrd, parameters)


def check_room(directory: Path, size: int) -> None:
    """Raises ImageError when a file system has less room than that. A program would say so less well, and later."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise ImageError(
            f"{directory} has room for {free / 1e6:.0f} MB, and the guest takes {size / 1e6:.0f} MB; "
            "make room there, or choose another directory with --output and TMPDIR"
        )
