"""A tree as a read-only file system in a file: ext4 or erofs, made by the distribution's own programs.

They run without root and write to plain files. The same tree gives the same bytes, whoever builds it and when:
everything belongs to root, times and identifiers are fixed, and no configuration of the machine is read.
"""

from __future__ import annotations

import stat
import uuid
from typing import TYPE_CHECKING, Literal

from guest_image.errors import ToolFailed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from guest_image.cpio import Entry, Tree
    from guest_image.tools import Root

FileSystem = Literal["ext4", "erofs"]
BLOCK_BYTES = 4096
"""The page size: only blocks of a page can be mapped into memory directly (DAX)."""
_MIB = 2**20
#: Zero would be "now" for the programs.
_TIME_S = 1
#: What mke2fs would take from a file of the machine. The journal is of no use to what is never written, but the words
#: by which Kata mounts a root file system (data=ordered) are refused without one.
_EXT4_FEATURES = "none,has_journal,ext_attr,dir_index,filetype,extent,sparse_super,large_file,extra_isize"
_EXT4_JOURNAL_MIB = 4
_EXT4_INODE_BYTES = 256


def file_system(kind: FileSystem, tree: Tree, seed: bytes, tools: Root, work: Path) -> bytes:
    """The tree's directories, files and links. Devices are left out: the guest's kernel makes them.

    `seed` decides the identifiers; `work` is an empty directory for what is only needed meanwhile. Raises ToolFailed.
    """
    directory, target = work / "tree", work / "file-system"
    entries = [(path, entry) for path, entry in tree if not stat.S_ISCHR(entry.mode)]
    directory.mkdir()
    directory.chmod(0o755)
    _spread(directory, entries)
    make = _ext4 if kind == "ext4" else _erofs
    make(target, directory, entries, uuid.UUID(bytes=seed[:16], version=4), tools)
    return target.read_bytes()


def _spread(directory: Path, entries: list[tuple[str, Entry]]) -> None:
    for path, entry in entries:
        target = directory / path
        if stat.S_ISLNK(entry.mode):
            target.symlink_to(entry.data.decode())
            continue
        if stat.S_ISDIR(entry.mode):
            target.mkdir()
        else:
            target.write_bytes(entry.data)
        target.chmod(stat.S_IMODE(entry.mode))


def _ext4(
    target: Path, directory: Path, entries: list[tuple[str, Entry]], identity: uuid.UUID, tools: Root
) -> None:
    inodes = len(entries) + 64
    data = sum(_whole_blocks(len(entry.data)) + BLOCK_BYTES for _, entry in entries)
    # The journal, the inodes, and an eighth for the tables that say where everything is.
    size = data * 9 // 8 + inodes * _EXT4_INODE_BYTES + (_EXT4_JOURNAL_MIB + 1) * _MIB
    options = {
        "-t": "ext4",
        "-O": _EXT4_FEATURES,
        "-b": BLOCK_BYTES,
        "-I": _EXT4_INODE_BYTES,
        "-N": inodes,
        "-m": 0,
        "-J": f"size={_EXT4_JOURNAL_MIB}",
        "-E": f"hash_seed={identity},lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0",
        "-U": identity,
        "-d": directory,
    }
    words = (str(word) for pair in options.items() for word in pair)
    environment = {"MKE2FS_CONFIG": "/dev/null", "E2FSPROGS_FAKE_TIME": str(_TIME_S)}
    mke2fs = tools.find("usr/sbin/mke2fs", "sbin/mke2fs")
    tools.run(mke2fs, "-q", "-F", *words, target, str(size // BLOCK_BYTES), env=environment)
    _give_to_root(target, entries, tools, environment)


def _give_to_root(
    target: Path, entries: list[tuple[str, Entry]], tools: Root, environment: Mapping[str, str]
) -> None:
    """mke2fs takes owners and times of change from the directory it copies, where they are the builder's."""
    script = "".join(
        f'set_inode_field "/{path}" {field} {value}\n'
        for path, _ in (("", None), *entries)
        for field, value in (("uid", 0), ("gid", 0), *((f"{name}time", f"@{_TIME_S}") for name in "acm"))
    )
    commands = target.with_name("debugfs-commands")
    commands.write_text(script)
    debugfs = tools.find("usr/sbin/debugfs", "sbin/debugfs")
    said = tools.run(debugfs, "-w", "-f", commands, target, env=environment).decode(errors="replace")
    # It repeats every command, goes on after one that fails, and ends well.
    failed = [line for line in said.splitlines() if line and not line.startswith("debugfs:")]
    if failed:
        raise ToolFailed(f"debugfs cannot set the owners of the root file system: {failed[0]}", tuple(failed))


def _erofs(
    target: Path, directory: Path, entries: list[tuple[str, Entry]], identity: uuid.UUID, tools: Root
) -> None:
    # Data apart from the inodes and uncompressed: the rest could not be mapped into memory directly.
    words = (f"-T{_TIME_S}", f"-U{identity}", "--all-root", "-Enoinline_data")
    tools.run(tools.find("usr/bin/mkfs.erofs"), "--quiet", *words, target, directory)


def _whole_blocks(size: int) -> int:
    return size + -size % BLOCK_BYTES
