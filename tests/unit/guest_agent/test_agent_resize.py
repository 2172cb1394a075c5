"""File systems that grow with their disks: what is looked at and refused. That they grow is seen with real disks."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest

from guest_agent import resize
from guest_agent.errors import InvalidRequest, NotSupported

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The kernel's folder of the disk that `tmp_path` is on."""
    device = tmp_path.stat().st_dev
    folder = tmp_path / "sys" / "dev" / "block" / f"{os.major(device)}:{os.minor(device)}"
    (folder / "device").mkdir(parents=True)
    (folder / "size").write_text("2048\n")
    return folder


@pytest.fixture
def disk(folder: Path, tmp_path: Path) -> resize.Disk:
    return resize.Disk(str(tmp_path), sys=str(tmp_path / "sys"))


def test_its_size_and_looking_again(disk: resize.Disk, folder: Path) -> None:
    assert disk.size_bytes == 1 << 20
    disk.look_again()  # virtio has nothing to be told
    assert os.listdir(folder / "device") == []
    (folder / "device" / "rescan").touch()
    disk.look_again()
    assert (folder / "device" / "rescan").read_text() == "1"


def test_it_does_not_shrink(disk: resize.Disk) -> None:
    with pytest.raises(InvalidRequest, match=r"bytes for files, and does not shrink to 4096"):
        disk.grow(4096)


@pytest.mark.parametrize(
    ("kind", "calls"),
    [
        ("ext4", [(0x40086610, struct.pack("=Q", (1 << 60) // 4096))]),
        ("xfs", [(0x80705864, bytes(112)), (0x4010586E, struct.pack("=QI4x", (1 << 60) // 4096, 0))]),
    ],
)
def test_what_the_kernel_is_told(
    disk: resize.Disk, monkeypatch: pytest.MonkeyPatch, kind: str, calls: list[tuple[int, bytes]]
) -> None:
    told: list[tuple[int, bytes]] = []
    fails = False

    def ioctl(fd: int, command: int, data: bytes) -> None:
        told.append((command, bytes(data)))
        if fails:
            raise OSError(22, "Invalid argument")

    class Room:
        f_frsize, f_blocks = 4096, 1000

    monkeypatch.setattr("fcntl.ioctl", ioctl)
    monkeypatch.setattr(os, "statvfs", lambda path: Room)
    monkeypatch.setattr(disk, "_file_system", lambda: kind)
    disk.grow(1 << 60)
    assert told == calls
    fails = True
    with pytest.raises(InvalidRequest, match=f"{kind} does not become .* Invalid argument; it only grows"):
        disk.grow(1 << 60)


def test_other_file_systems(disk: resize.Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="nothing is mounted at"):
        disk.grow(1 << 60)
    monkeypatch.setattr(disk, "_file_system", lambda: "erofs")
    with pytest.raises(NotSupported, match="erofs does not grow while it is mounted"):
        disk.grow(1 << 60)
