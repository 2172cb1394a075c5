"""Root images: the disk, its file systems and hashes, and the script that mounts it."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from guest_image import ImageError, root_image
from guest_image.cpio import Tree
from guest_image.disk import ALIGNMENT_BYTES, FIRST_PARTITION_BYTES, disk
from guest_image.errors import ToolFailed
from guest_image.file_systems import file_system
from guest_image.hash_tree import hash_tree
from guest_image.image_initrd import image_initrd, init_script
from guest_image.kernel import Module
from guest_image.tools import Root
from hypervisor.arch import arch_named
from hypervisor.qemu.kernel_words import kernel_command_line
from hypervisor.spec import VmSpec
from hypervisor.verity import Verity
from tests.unit.guest_image.elves import library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from guest_image.file_systems import FileSystem

REPOSITORY = Path(__file__).parents[3]
#: Of this machine, or where the builder unpacks them.
MKE2FS = Root(Path("/"), "amd64", {})
EROFS = next(
    (Root(path, "amd64", {}) for path in (REPOSITORY / "build/cache").glob("kata-py/guest/*-amd64/tools/image-tools-*")
     if path.is_dir()),
    Root(Path("/"), "amd64", {}),
)  # fmt: skip
SEED = bytes(range(32))

# Hashes


@pytest.mark.parametrize(
    ("blocks", "salt", "root_hash", "hashes"),
    [
        (300, "0011", "268284199d1790cdb09a38ab7b170e366d995a4f88098b14a33b3ec592e79e02",
         "f5aa3d6db62e44bd04134da98785bb2f2328fafd674e31f4593712f6f979ec24"),
        (300, "", "edc24cd4615abcd726845d41c1e48a99aeb5837da57ffd6c74dce3919d1d6447", None),
    ],
)  # fmt: skip
def test_hashes_are_those_of_veritysetup(blocks: int, salt: str, root_hash: str, hashes: str | None) -> None:
    """`veritysetup format --no-superblock` said these."""
    tree = hash_tree(b"".join(bytes([i % 251]) * 4096 for i in range(blocks)), bytes.fromhex(salt))
    assert tree.root_hash == root_hash
    if hashes is not None:
        assert hashlib.sha256(tree.blocks).hexdigest() == hashes
    parsed = Verity.parse(tree.parameters())
    assert (parsed.data_blocks, parsed.salt) == (blocks, salt or "-")


def test_a_single_block_is_its_own_tree() -> None:
    tree = hash_tree(b"x" * 4096, b"\x00\x11")
    assert tree.blocks == b""
    assert tree.root_hash == "3f0fd50e4d8002018efe9e516b6d774e1c9e163703d99d42ce54ca9f0aec1213"


# The disk


@pytest.mark.parametrize("begin", [0, ALIGNMENT_BYTES])
@pytest.mark.parametrize("sizes", [(1,), (4096, 8192), (ALIGNMENT_BYTES, ALIGNMENT_BYTES + 1)])
def test_partitions_follow_each_other(sizes: tuple[int, ...], begin: int) -> None:
    """Read as a disk, and as persistent memory, which begins later."""
    whole = disk([bytes([index + 1]) * size for index, size in enumerate(sizes)])
    image = whole[begin:]
    assert len(image) % ALIGNMENT_BYTES == 0
    assert image[510:512] == b"\x55\xaa"
    following = FIRST_PARTITION_BYTES - begin
    for index in range(4):
        entry = image[446 + 16 * index : 462 + 16 * index]
        if index >= len(sizes):
            assert entry == bytes(16)
            continue
        kind, (first, count) = entry[4], struct.unpack_from("<II", entry, 8)
        assert kind == 0x83
        assert first * 512 == following
        data = image[first * 512 : (first + count) * 512]
        assert data.rstrip(b"\0") == bytes([index + 1]) * sizes[index]
        following += count * 512
    assert following == len(image)


def test_the_header_of_persistent_memory() -> None:
    """As the kernel reads it: struct nd_pfn_sb and nd_fletcher64()."""
    image = disk([b"x"])
    header = image[4096:8192]
    assert header[:16] == b"NVDIMM_PFN_INFO\0"
    assert header[32:48] == bytes(16)  # of no other namespace's
    data_offset, pages, mode, start_pad, end_cut, alignment = struct.unpack_from("<QQIIII", header, 56)
    assert (data_offset, alignment) == (ALIGNMENT_BYTES, ALIGNMENT_BYTES)
    assert data_offset + pages * 4096 == len(image)
    assert (mode, start_pad, end_cut) == (1, 0, 0)
    low = high = 0
    for word in (*struct.unpack("<1022I", header[:-8]), 0, 0):
        low = (low + word) % 2**32
        high += low
    assert int.from_bytes(header[-8:], "little") == (high << 32 | low) % 2**64


# File systems


def example() -> Tree:
    tree = Tree()
    tree.file("init", b"#!/bin/x\n", 0o755)
    tree.file("usr/lib/large", b"data" * 100_000)
    tree.file("etc/odd name", b"")
    tree.directory("tmp", 0o1777)
    tree.symlink("lib", "usr/lib")
    tree.symlink("long", "x" * 100)
    tree.character_device("dev/console", 5, 1)
    return tree


CASES = [
    pytest.param(
        "ext4", MKE2FS, id="ext4",
        marks=pytest.mark.skipif(not Path("/sbin/debugfs").exists(), reason="no e2fsprogs"),
    ),
    pytest.param(
        "erofs", EROFS, id="erofs",
        marks=pytest.mark.skipif(
            not (EROFS.path / "usr/bin/mkfs.erofs").exists(), reason="no erofs-utils: run make root-images"
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tools"), CASES)
def test_the_same_tree_is_the_same_file_system(
    kind: FileSystem, tools: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever builds it, and when; nothing of the machine's configuration has a part in it."""
    images = []
    for number, umask in enumerate((0o022, 0o077)):
        work = tmp_path / str(number)
        work.mkdir()
        before = os.umask(umask)
        try:
            images.append(file_system(kind, example(), SEED, tools, work))
        finally:
            os.umask(before)
        monkeypatch.setenv("TZ", "Asia/Tokyo")
        time.sleep(1.1)  # the file systems' clocks count seconds
    assert images[0] == images[1]
    other = tmp_path / "other"
    other.mkdir()
    assert file_system(kind, example(), bytes(32), tools, other) != images[0]


@pytest.mark.skipif(not Path("/sbin/debugfs").exists(), reason="no e2fsprogs")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_everything_belongs_to_root_whoever_builds_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o011)
    child = os.fork()
    if child == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            work = tmp_path / "nobody"
            work.mkdir()
            (work / "done").write_bytes(file_system("ext4", example(), SEED, MKE2FS, work))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    ours = tmp_path / "ours"
    ours.mkdir()
    assert (tmp_path / "nobody" / "done").read_bytes() == file_system("ext4", example(), SEED, MKE2FS, ours)
    assert (tmp_path / "nobody" / "tree" / "init").stat().st_uid == 65534
    listed = debugfs(ours / "file-system", "ls -l /")
    owners = {tuple(line.split()[3:5]) for line in listed.splitlines() if line.strip()}
    assert owners == {("0", "0")}


@pytest.mark.skipif(not Path("/sbin/debugfs").exists(), reason="no e2fsprogs")
def test_what_is_in_it(tmp_path: Path) -> None:
    image = tmp_path / "image"
    work = tmp_path / "work"
    work.mkdir()
    image.write_bytes(file_system("ext4", example(), SEED, MKE2FS, work))
    checked = subprocess.run(["/sbin/e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    dumped = tmp_path / "dumped"
    dumped.mkdir()
    debugfs(image, f"rdump / {dumped}")
    assert (dumped / "usr/lib/large").read_bytes() == b"data" * 100_000
    assert (dumped / "etc/odd name").read_bytes() == b""
    assert os.readlink(dumped / "long") == "x" * 100
    assert "Mode:  01777" in debugfs(image, "stat /tmp")
    assert os.access(dumped / "init", os.X_OK)
    assert list((dumped / "dev").iterdir()) == []


def debugfs(image: Path, command: str) -> str:
    done = subprocess.run(["/sbin/debugfs", "-R", command, image], capture_output=True, text=True, check=True)
    return done.stdout


def test_an_owner_that_cannot_be_set_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """debugfs ends with 0 whatever happens."""

    class Tools:
        def find(self, *names: str) -> Path:
            return Path(names[0])

        def run(self, program: Path, *words: object, env: object = None) -> bytes:
            if program.name == "mke2fs":
                (tmp_path / "file-system").write_bytes(b"")
                return b""
            return b"debugfs: set_inode_field / uid 0\n/init: File not found by ext2_lookup\n"

    with pytest.raises(
        ToolFailed, match="cannot set the owners of the root file system: /init: File not found"
    ):
        file_system("ext4", example(), SEED, Tools(), tmp_path)  # type: ignore[arg-type]


# What is asked for


@pytest.mark.parametrize(
    ("kind", "arch", "verity", "text"),
    [
        ("xfs", "amd64", False, "no root image with file system 'xfs': known are ext4, erofs"),
        ("ext4", "s390x", False, "no root image for s390x: they are made for amd64 and arm64"),
        (None, "s390x", True, "verity is of a root image"),
    ],
)
def test_what_cannot_be_built(kind: str | None, arch: str, verity: bool, text: str) -> None:
    with pytest.raises(ImageError, match=text):
        root_image.check(kind, arch, verity=verity)


def test_a_full_disk_is_told_before(tmp_path: Path) -> None:
    root_image.check_room(tmp_path, 1)
    with pytest.raises(ImageError, match=f"{tmp_path} has room for .* MB, and the guest takes 1000000000"):
        root_image.check_room(tmp_path, 10**15)


# The script of the small initrd

DRIVERS = {
    "@DISK@": ["virtio_pci", "virtio_blk"],
    "@PMEM@": ["nfit", "nd_pmem"],
    "@FILE_SYSTEM@": ["erofs"],
    "@VERITY@": ["dm_mod", "dm_verity"],
}
VERITY = Verity.parse(hash_tree(b"x" * 8192, b"\x01").parameters())
TABLE = VERITY.kernel_word("/dev/vda1", "/dev/vda2").partition('"')[2].rstrip('"')
BEFORE = [
    f"mount -t {kind} {kind} {path}"
    for kind, path in (("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"))
]
AFTER = ["umount /dev /sys /proc", "switch_root /image /init"]


def insmods(*names: str) -> list[str]:
    return [f"insmod /modules/{name}.ko" for name in names]


@pytest.fixture
def run_script(tmp_path: Path) -> Callable[..., tuple[list[str], list[str]]]:
    """Runs the script with programs that only tell how they are called: their calls, and what the script says."""
    programs = tmp_path / "bin"
    programs.mkdir()

    def run(
        drivers: dict[str, list[str]], *, fails: str = "", **fields: object
    ) -> tuple[list[str], list[str]]:
        for name in ("mount", "umount", "insmod", "dmsetup", "switch_root", "reboot", "cat"):
            end = "kill $PPID" if name == "reboot" else "true"
            program = f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/calls\n[ "{name}" != "{fails}" ] || exit 1\n{end}\n'
            (programs / name).write_text(program)
            (programs / name).chmod(0o755)
        spec = VmSpec(
            name="x",
            run_dir=tmp_path,
            qemu_path=tmp_path,
            kernel=tmp_path,
            image=Path("/i"),
            **fields,  # type: ignore[arg-type]
        )
        (tmp_path / "cmdline").write_text(kernel_command_line(spec, arch_named("x86_64")) + "\n")
        script = init_script(drivers).replace("/proc/cmdline", str(tmp_path / "cmdline"))
        done = subprocess.run(
            ["/bin/sh", "-c", script],
            env={"PATH": str(programs)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        return (tmp_path / "calls").read_text().splitlines(), done.stdout.splitlines()

    return run


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        (
            {},
            [
                *insmods("virtio_pci", "virtio_blk", "erofs"),
                "mount -r -t ext4 -o data=ordered,errors=remount-ro /dev/vda1 /image",
            ],
        ),
        (
            {"rootfs_driver": "nvdimm", "rootfs_type": "erofs"},
            [
                *insmods("nfit", "nd_pmem"),
                "cat /sys/bus/nd/devices/ndbus0/wait_probe",
                *insmods("erofs"),
                "mount -r -t erofs -o dax /dev/pmem0p1 /image",
            ],
        ),
        (
            {"rootfs_type": "erofs", "verity": VERITY},
            [
                *insmods("virtio_pci", "virtio_blk", "erofs", "dm_mod", "dm_verity"),
                f"dmsetup --noudevsync --noudevrules create --concise {TABLE}",
                "mount -r -t erofs -o ro /dev/dm-0 /image",
            ],
        ),
        (
            {"kernel_params": "rootflags=noatime a=* root=/dev/vda2"},
            [
                *insmods("virtio_pci", "virtio_blk", "erofs"),
                "mount -r -t ext4 -o noatime /dev/vda2 /image",
            ],
        ),
    ],
    ids=["disk", "pmem", "verity", "words"],
)
def test_the_script_follows_the_kernels_words(
    run_script: Callable[..., tuple[list[str], list[str]]], fields: dict[str, object], calls: list[str]
) -> None:
    assert run_script(DRIVERS, **fields) == ([*BEFORE, *calls, *AFTER], [])


@pytest.mark.parametrize(
    ("drivers", "fails", "fields", "said"),
    [
        ({}, "insmod", {}, "cannot load the kernel module virtio_pci"),
        ({}, "mount", {}, "cannot mount /dev/vda1 as ext4"),
        ({}, "dmsetup", {"verity": VERITY}, f"cannot set up dm-verity: {TABLE}"),
        (
            {"@PMEM@": []},
            "",
            {"rootfs_driver": "nvdimm"},
            "it has no driver for persistent memory on this architecture; use a virtio disk",
        ),
        (
            {"@VERITY@": []},
            "",
            {"verity": VERITY},
            "it was built without dm-verity; remove kernel_verity_params or build it with --verity",
        ),
    ],
)
def test_the_script_says_why_it_ends(
    run_script: Callable[..., tuple[list[str], list[str]]],
    drivers: dict[str, list[str]],
    fails: str,
    fields: dict[str, object],
    said: str,
) -> None:
    calls, lines = run_script(DRIVERS | drivers, fails=fails, **fields)
    assert calls[-1] == "reboot -f"
    assert lines == [f"guest image: {said}"]


# The archive of the small initrd


class Drivers:
    """Every driver is a module of its own, and needs `core`."""

    def closure(self, names: Sequence[str]) -> list[Module]:
        return [Module(name, (), name.encode()) for name in (["core", *names] if names else [])]


ALWAYS = {"busybox", "core.ko", "virtio_pci.ko", "virtio_blk.ko", "erofs.ko", "init", "console"}


@pytest.mark.parametrize(
    ("arch", "verity", "more"),
    [
        ("amd64", False, {"nfit.ko", "nd_pmem.ko"}),
        ("amd64", True, {"nfit.ko", "nd_pmem.ko", "dm_mod.ko", "dm_verity.ko", "dmsetup"}),
        ("arm64", True, {"dm_mod.ko", "dm_verity.ko", "dmsetup"}),
    ],
)
def test_the_small_initrd_has_what_its_image_needs(
    tmp_path: Path, arch: str, verity: bool, more: set[str]
) -> None:
    for name in ("bin/busybox", "sbin/dmsetup"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(library([], []))
    modules: Any = Drivers()
    archive = image_initrd(
        "erofs", arch=arch, verity=verity, modules=modules, packages=Root(tmp_path, arch, {})
    )
    entries = re.findall(rb"070701([0-9A-F]{104})([^\0]+)\0", archive)
    modes = {name.decode().rpartition("/")[2]: int(fields[8:16], 16) for fields, name in entries}
    assert {name for name, mode in modes.items() if stat.S_ISREG(mode) or stat.S_ISCHR(mode)} == ALWAYS | more
    assert {"sh", "insmod", "switch_root"} <= {name for name, mode in modes.items() if stat.S_ISLNK(mode)}
    assert {"proc", "sys", "dev", "image"} <= {name for name, mode in modes.items() if stat.S_ISDIR(mode)}
