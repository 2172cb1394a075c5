"""Encrypted disks: what the kernel is told, and what is undone when something fails. The kernel is real elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent_proto.gen import agent_pb2 as pb
from guest_agent import encryption
from guest_agent.errors import InvalidRequest, NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable

OPTIONS = ["encryption_key=ephemeral", "create_filesystem", "root_owner=5:6", "root_mode=2770"]


def storage(*options: str, fstype: str = "ext4", source: str = "/dev/vdb") -> pb.Storage:
    return pb.Storage(driver="blk", source=source, fstype=fstype, mount_point="/v", driver_options=options)


def test_which_storages_are_encrypted() -> None:
    assert encryption.wanted(storage(*OPTIONS))
    assert not encryption.wanted(storage())
    for options in (
        ["encryption_key=sealed.x", "create_filesystem"],
        ["encryption_key=ephemeral"],
        ["other=1"],
    ):
        with pytest.raises(
            NotSupported, match="known is a disk with ext4 that is made anew with a key of the guest's"
        ):
            encryption.wanted(storage(*options))
    with pytest.raises(NotSupported):
        encryption.wanted(storage(*OPTIONS, fstype="xfs"))


class NoModules:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_if_present(self, name: str) -> None:
        self.loaded.append(name)


class Kernel:
    """Takes the calls of the device mapper; `fails` is the one that it refuses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, control: Path) -> None:
        self.calls: list[tuple[int, bytes]] = []
        self.fails: int | None = None
        monkeypatch.setattr(encryption, "_CONTROL", str(control))
        monkeypatch.setattr("fcntl.ioctl", self.ioctl)
        control.touch()

    def ioctl(self, fd: int, command: int, data: bytearray) -> None:
        self.calls.append((command & 0xFF, bytes(data)))
        if command & 0xFF == self.fails:
            raise OSError(22, "Invalid argument")
        if command & 0xFF == 3:
            data[40:48] = (254 << 8 | 1).to_bytes(8, "little")  # 254:1


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Kernel:
    return Kernel(monkeypatch, tmp_path / "control")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "vdb"
    path.write_bytes(bytes(1 << 20))
    return path


def made(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(encryption, "_unpacked", lambda: (program, {}))


async def prepared(disk: Path, aside: Callable[[], None] | None = None) -> str:
    return await encryption.prepare(storage(*OPTIONS, source=str(disk)), NoModules(), None)  # type: ignore[arg-type]


async def test_what_the_kernel_is_told(kernel: Kernel, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[object] = []

    async def aside(reaper: object, work: object) -> None:
        ran.append(work)

    monkeypatch.setattr(encryption, "aside", aside)
    made(monkeypatch, "/bin/mke2fs")
    assert await prepared(disk) == "/dev/dm-1"
    assert [number for number, _ in kernel.calls] == [3, 9, 6]
    table = kernel.calls[1][1]
    (key,) = re.findall(
        rb"aes-xts-plain64 ([0-9a-f]{128}) 0 %s 0 1 allow_discards\0" % os.fsencode(disk), table
    )
    assert table[312:328] == (0).to_bytes(8, "little") + (2048).to_bytes(8, "little")
    assert len(table) % 8 == 0
    assert int.from_bytes(table[12:16], "little") == len(table)
    # All of them ask that the kernel wipes its copy.
    assert all(int.from_bytes(data[28:32], "little") & 1 << 15 for _, data in kernel.calls)
    await prepared(disk)
    assert key not in kernel.calls[4][1]
    (_, (program, *words), _) = ran[0].args  # type: ignore[attr-defined]
    assert (program, words[-1]) == ("/bin/mke2fs", "/dev/dm-1")


@pytest.mark.parametrize(("fails", "calls"), [(3, [3]), (9, [3, 9, 4]), (6, [3, 9, 6, 4])])
async def test_a_refusal_leaves_no_device(kernel: Kernel, disk: Path, fails: int, calls: list[int]) -> None:
    kernel.fails = fails
    with pytest.raises(OSError, match="Invalid argument"):
        await prepared(disk)
    assert [number for number, _ in kernel.calls] == calls


async def test_a_file_system_that_cannot_be_made(
    kernel: Kernel, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def aside(reaper: object, work: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(encryption, "aside", aside)
    made(monkeypatch, "/bin/mke2fs")
    with pytest.raises(InvalidRequest, match=r"no file system can be made on disk .*: mke2fs ended with 1"):
        await prepared(disk)
    assert kernel.calls[-1][0] == 4


def test_whose_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    owners: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: owners.append((uid, gid)))
    ours = storage(*OPTIONS)
    ours.mount_point = str(tmp_path)
    encryption.set_owner(ours)
    assert list(tmp_path.iterdir()) == []
    assert owners == [(5, 6)]
    assert tmp_path.stat().st_mode & 0o7777 == 0o2770
    for wrong in ("root_owner=x", "root_mode=rwx", "root_owner=1:2:3"):
        ours.driver_options[:] = [wrong]
        with pytest.raises(InvalidRequest, match=wrong):
            encryption.set_owner(ours)


def test_the_program_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zlib

    packed = tmp_path / "packed" / "mke2fs"
    packed.mkdir(parents=True)
    for name in ("mke2fs", "libx.so.1"):
        (packed / f"{name}.z").write_bytes(zlib.compress(name.encode()))
    monkeypatch.setattr(encryption, "PROGRAMS", str(tmp_path / "packed"))
    monkeypatch.setattr(encryption, "_UNPACKED", str(tmp_path / "unpacked"))
    for _ in range(2):
        program, environment = encryption._unpacked()
        assert Path(program).read_text() == "mke2fs"
        assert os.access(program, os.X_OK)
        assert (Path(environment["LD_LIBRARY_PATH"]) / "libx.so.1").read_text() == "libx.so.1"
        for path in packed.iterdir():
            path.write_bytes(b"not looked at again")
