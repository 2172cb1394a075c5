"""`emptyDir` volumes on disks of the guest: which, and the images that are made for them."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from agent_proto.gen import oci_pb2
from config.schema import Qemu
from hypervisor.errors import HostUnsupported
from shim import ext4_images, mounts
from shim.disk_needs import Need, NewImage, volume_on_disk
from shim.errors import InvalidRequest, NotSupported

if TYPE_CHECKING:
    from pathlib import Path

PLAIN, ENCRYPTED = "block-plain", "block-encrypted"


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests' own directories are on."""
    monkeypatch.setattr(mounts, "in_memory", lambda path: False)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    folder = tmp_path / "pods" / "1-2" / "volumes" / "kubernetes.io~empty-dir" / "cache"
    folder.mkdir(parents=True)
    folder.chmod(0o2770)
    return folder


def needed(source: Path | str, mode: str = PLAIN, *, qemu: Qemu | None = None) -> Need | None:
    mount = oci_pb2.Mount(type="bind", source=str(source), destination="/c", options=["rbind", "ro"])
    need = volume_on_disk(mount, str(source), qemu or Qemu(), None, mode)
    assert need is None or need.mount is mount
    return need


def test_which_are_on_disks(volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = needed(f"{volume}/")
    assert need is not None
    assert (need.path, need.fstype, need.discard) == (f"{volume}/kata-disk.img", "ext4", True)
    # Another container may write to it.
    assert not need.read_only
    assert needed(volume, "shared-fs") is None
    below = volume / "below"
    below.mkdir()
    assert needed(below) is None
    config_map = volume.parents[1] / "kubernetes.io~configmap" / "cache"
    config_map.mkdir(parents=True)
    assert needed(config_map) is None
    assert needed(volume.parent / "none") is None
    monkeypatch.setattr(mounts, "in_memory", lambda path: True)
    assert needed(volume) is None
    assert needed(volume, ENCRYPTED) is None


def test_what_cannot_be_had_is_refused(volume: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"^emptyDir cache: .* and disable_block_device_use is set; remove that"
    ):
        needed(volume, qemu=Qemu(disable_block_device_use=True))
    with pytest.raises(NotSupported, match=r"^volume /c needs a disk"):
        needed(volume, qemu=Qemu(block_device_driver="virtio-pmem"))
    parts = volume.parents[2] / "volume-subpaths"
    for mode in (PLAIN, ENCRYPTED):
        with pytest.raises(InvalidRequest, match=r"^emptyDir cache: .* /c is to be a part of it \(subPath\)"):
            needed(parts / "cache" / "web" / "0", mode)
    assert needed(parts / "other" / "web" / "0") is None


async def test_an_encrypted_disk_is_made_by_the_guest(volume: Path) -> None:
    need = needed(volume, ENCRYPTED)
    assert need is not None
    owner = volume.stat()
    assert list(need.driver_options) == [
        "encryption_key=ephemeral",
        "create_filesystem",
        f"root_owner={owner.st_uid}:{owner.st_gid}",
        "root_mode=2770",
    ]
    assert need.whole_life
    os.close(await opened(volume, ENCRYPTED))
    image = volume / "kata-disk.img"
    assert image.stat().st_size > 0
    assert image.stat().st_blocks == 0


async def opened(volume: Path, mode: str = PLAIN) -> int:
    need = needed(volume, mode)
    assert need is not None
    assert need.image is not None
    return await ext4_images.open_image(need.image, None)


async def test_the_image(volume: Path) -> None:
    os.close(await opened(volume))
    image = volume / "kata-disk.img"
    assert os.listdir(volume) == [image.name]
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    room = os.statvfs(volume)
    assert 0 <= min(room.f_blocks * room.f_frsize, 8 << 40) - image.stat().st_size < 4096
    assert image.stat().st_blocks * 512 < 64 << 20

    def inside(command: str) -> str:
        argv = ["/usr/sbin/debugfs", "-R", command, str(image)]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout

    root = inside("stat <2>").split()
    assert root[root.index("Mode:") + 1] == "02770"
    owner = volume.stat()
    assert (root[root.index("User:") + 1], root[root.index("Group:") + 1]) == (
        str(owner.st_uid),
        str(owner.st_gid),
    )
    assert [line.split("/")[5] for line in inside("ls -p /").split()] == [".", ".."]
    checked = subprocess.run(
        ["/usr/sbin/e2fsck", "-fn", image], capture_output=True, text=True, check=False, timeout=60
    )
    assert checked.returncode == 0, checked.stdout
    # Found again, with what is in it.
    before = image.stat().st_ino
    os.close(await opened(volume))
    assert image.stat().st_ino == before


async def test_what_was_left_half_made_is_made_anew(volume: Path) -> None:
    (volume / "kata-disk.img.new").write_text("half")
    os.close(await opened(volume))
    assert os.listdir(volume) == ["kata-disk.img"]


async def test_a_folder_that_was_opened_for_nobody_is_closed(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, opened_late = threading.Event(), list[int]()

    def late(folder: str, *, namespace: int | None) -> int:
        go.wait()
        opened_late.append(os.open(folder, os.O_PATH))
        return opened_late[0]

    monkeypatch.setattr(mounts, "open_directory", late)
    image = NewImage(folder=str(volume), name="x", what="a test", otherwise="leave it")
    making = asyncio.create_task(ext4_images.open_image(image, None))
    await asyncio.sleep(0)
    making.cancel()
    await asyncio.gather(making, return_exceptions=True)
    go.set()
    for thread in threading.enumerate():
        if thread.name == "aside":
            thread.join()
    await asyncio.sleep(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(opened_late[0])


async def test_nothing_else_is_taken_for_the_image(volume: Path, tmp_path: Path) -> None:
    image = volume / "kata-disk.img"
    os.mkfifo(image)
    with pytest.raises(
        InvalidRequest, match=r"is not the image that kata-py makes for emptyDir .*; remove it"
    ):
        await opened(volume)
    image.unlink()
    (tmp_path / "other").write_text("x")
    image.symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        await opened(volume)
    image.unlink()
    os.link(tmp_path / "other", image)
    with pytest.raises(InvalidRequest, match="is not the image"):
        await opened(volume)


async def test_a_failure_leaves_nothing(
    volume: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ext4_images, "_PROGRAMS", str(tmp_path))
    with pytest.raises(
        HostUnsupported, match=r"^mkfs\.ext4 is missing, .*; install e2fsprogs, or set emptydir_mode"
    ):
        await opened(volume)
    program = tmp_path / "mkfs.ext4"
    program.write_text("#!/bin/sh\necho no room; exit 1\n")
    program.chmod(0o755)
    with pytest.raises(OSError, match=r"cannot make the disk of emptyDir .*: mkfs\.ext4: .*no room"):
        await opened(volume)
    assert os.listdir(volume) == []
