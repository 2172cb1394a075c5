from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest

from agent_proto.gen import agent_pb2 as pb
from guest_agent import encryption, mount, storage, syscalls
from guest_agent.errors import InvalidRequest, NotSupported
from guest_agent.storage import SANDBOX_USER, Storages, set_group

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@pytest.mark.parametrize(
    ("options", "flags", "data"),
    [
        ([], 0, ""),
        (
            ["ro", "nosuid", "size=64k", "mode=1777"],
            syscalls.MS_RDONLY | syscalls.MS_NOSUID,
            "size=64k,mode=1777",
        ),
        (["ro", "rw"], 0, ""),
        (["noexec", "exec", "nodev"], syscalls.MS_NODEV, ""),
        (["rbind"], syscalls.MS_BIND | syscalls.MS_REC, ""),
        (["defaults", "", "dax"], 0, "dax"),
        (["pagesize=2097152,size=4194304"], 0, "pagesize=2097152,size=4194304"),
        (["lowerdir=/a:/b", "upperdir=/c", "index=off"], 0, "lowerdir=/a:/b,upperdir=/c,index=off"),
    ],
)
def test_options(options: list[str], flags: int, data: str) -> None:
    parsed = mount.parse(options)
    assert (parsed.flags, parsed.data, parsed.propagation) == (flags, data, ())


def test_propagation_is_set_afterwards() -> None:
    parsed = mount.parse(["rslave", "bind", "private"])
    assert parsed.flags == syscalls.MS_BIND
    assert parsed.propagation == (syscalls.MS_SLAVE | syscalls.MS_REC, syscalls.MS_PRIVATE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """System calls that were made, instead of being made."""
    made: list[tuple[Any, ...]] = []
    monkeypatch.setattr(syscalls, "mount", lambda *args: made.append(("mount", *args)))
    monkeypatch.setattr(syscalls, "umount", lambda *args: made.append(("umount", *args)))
    return made


def test_a_read_only_bind_takes_two_calls(calls: list[tuple[Any, ...]]) -> None:
    mount.mount("/a", "/b", "bind", ["ro", "rprivate"])
    assert calls == [
        ("mount", "/a", "/b", "", syscalls.MS_BIND | syscalls.MS_RDONLY, ""),
        ("mount", "", "/b", "", syscalls.MS_BIND | syscalls.MS_REMOUNT | syscalls.MS_RDONLY),
        ("mount", "", "/b", "", syscalls.MS_PRIVATE | syscalls.MS_REC),
    ]


@pytest.mark.parametrize(("number", "passes"), [(22, True), (2, True), (16, False)])
def test_unmounting_what_is_not_mounted(monkeypatch: pytest.MonkeyPatch, number: int, passes: bool) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(syscalls, "umount", refuse)
    if passes:
        mount.unmount("/x")
    else:
        with pytest.raises(OSError, match="busy"):
            mount.unmount("/x")


def test_mount_points_are_known() -> None:
    assert mount.is_mount_point("/proc")
    assert mount.is_mount_point("/proc/")
    assert not mount.is_mount_point("/proc/self")


def test_system_calls_report_their_errors() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        syscalls.mount("/nonexistent", "/nonexistent/either", "", syscalls.MS_BIND)
    assert caught.value.filename == "/nonexistent/either"
    with pytest.raises(OSError, match="/nonexistent"):
        syscalls.umount("/nonexistent")


# Storages


class FakeModules:
    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_if_present(self, name: str) -> None:
        self.loaded.append(name)


class Mounts:
    """Records what would be mounted; a source named "broken" fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now: list[str] = []
        self.seen: list[tuple[str, str, str, list[str]]] = []
        monkeypatch.setattr(storage, "mount", self.mount)
        monkeypatch.setattr(storage, "unmount", self.unmount)

    def unmount(self, target: str) -> None:
        if target in self.now:
            self.now.remove(target)

    def mount(self, source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
        if source == "broken":
            raise OSError(5, "Input/output error", target)
        self.seen.append((source, target, fstype, list(options)))
        self.now.append(target)


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> Mounts:
    return Mounts(monkeypatch)


@pytest.fixture
def storages() -> Storages:
    return Storages(FakeModules())  # type: ignore[arg-type]


def ephemeral(path: Path, *options: str, source: str = "tmpfs") -> pb.Storage:
    return pb.Storage(
        driver="ephemeral", source=source, fstype="tmpfs", mount_point=str(path), options=options
    )


@pytest.mark.parametrize(
    ("driver", "fstype", "loaded"),
    [("virtio-fs", "virtiofs", ["virtiofs"]), ("9p", "9p", ["9pnet_virtio", "9p"])],
)
async def test_shared_file_systems_load_their_modules(
    mounts: Mounts, tmp_path: Path, driver: str, fstype: str, loaded: list[str]
) -> None:
    modules = FakeModules()
    shared = pb.Storage(
        driver=driver,
        source="kataShared",
        fstype=fstype,
        mount_point=f"{tmp_path}/s/",
        options=["nodev"],
    )
    await Storages(modules).add([shared], "sb")  # type: ignore[arg-type]
    assert modules.loaded == loaded
    assert mounts.seen == [("kataShared", f"{tmp_path}/s/", fstype, ["nodev"])]


async def test_a_storage_stays_while_anybody_uses_it(
    mounts: Mounts, storages: Storages, tmp_path: Path
) -> None:
    one = ephemeral(tmp_path / "one")
    await storages.add([one, ephemeral(tmp_path / "two")], "a")
    await storages.add([one], "b")
    await storages.add([one], "b")
    assert len(mounts.seen) == 2
    storages.release("a")
    assert mounts.now == [f"{tmp_path}/one"]
    storages.release("b")
    storages.release("b")
    assert mounts.now == []


async def test_a_slow_disk_holds_up_only_those_who_want_it(
    mounts: Mounts, storages: Storages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = threading.Event()

    def mount(source: str, target: str, fstype: str, options: Iterable[str] = ()) -> None:
        if fstype == "xfs":
            mounted.wait()
        mounts.mount(source, target, fstype, options)

    monkeypatch.setattr(storage, "mount", mount)
    monkeypatch.setattr("stat.S_ISBLK", lambda mode: True)
    slow = pb.Storage(driver="blk", source="/dev/null", fstype="xfs", mount_point=f"{tmp_path}/slow")
    one = asyncio.create_task(storages.add([slow], "one"))
    two = asyncio.create_task(storages.add([slow], "two"))
    await storages.add([ephemeral(tmp_path / "quick")], "three")
    storages.release("three")
    assert not one.done()
    mounted.set()
    await asyncio.gather(one, two)
    assert [target for _, target, _, _ in mounts.seen] == [f"{tmp_path}/quick", f"{tmp_path}/slow"]
    storages.release("one")
    assert mounts.now == [f"{tmp_path}/slow"]
    storages.release("two")
    assert mounts.now == []


@pytest.mark.parametrize("fails", ["", "mount", "owner"])
async def test_an_encrypted_disk(
    mounts: Mounts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """What is mounted is not the disk; when that fails, the key is forgotten."""
    closed: list[str] = []

    async def prepare(*_: object) -> str:
        return "broken" if fails == "mount" else "/dev/dm-0"

    def set_owner(_: object) -> None:
        if fails == "owner":
            raise OSError(30, "Read-only file system")

    for name, value in (("prepare", prepare), ("set_owner", set_owner), ("close", closed.append)):
        monkeypatch.setattr(encryption, name, value)
    monkeypatch.setattr(storage.Storages, "_mount_device", storage.Storages._mount_as_is)
    storages = Storages(FakeModules(), object())  # type: ignore[arg-type]
    wanted = pb.Storage(
        driver="blk", source="/dev/vdb", fstype="ext4", mount_point=f"{tmp_path}/e", shared=True,
        driver_options=["encryption_key=ephemeral", "create_filesystem"],
    )  # fmt: skip
    if fails:
        with pytest.raises(OSError, match=r"Input/output|Read-only"):
            await storages.add([wanted], "c")
        assert (mounts.now, closed) == ([], ["kata-py-vdb"])
        return
    await storages.add([wanted], "c")
    assert [source for source, _, _, _ in mounts.seen] == ["/dev/dm-0"]
    storages.release("c")
    assert (mounts.now, closed) == ([f"{tmp_path}/e"], [])


async def test_one_disk_at_a_time_is_encrypted(
    mounts: Mounts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two that both found the program packed would take its files from under each other."""
    now, most = 0, 0

    async def prepare(wanted: pb.Storage, modules: object, reaper: object) -> str:
        nonlocal now, most
        now, most = now + 1, max(most, now + 1)
        await asyncio.sleep(0)
        now -= 1
        return "/dev/dm-0"

    monkeypatch.setattr(encryption, "prepare", prepare)
    monkeypatch.setattr(encryption, "set_owner", lambda wanted: None)
    monkeypatch.setattr(storage.Storages, "_mount_device", storage.Storages._mount_as_is)
    storages = Storages(FakeModules(), object())  # type: ignore[arg-type]
    wanted = [
        pb.Storage(
            driver="blk", source=f"/dev/{name}", fstype="ext4", mount_point=f"{tmp_path}/{name}",
            driver_options=["encryption_key=ephemeral", "create_filesystem"],
        ) for name in ("vdb", "vdc")
    ]  # fmt: skip
    await asyncio.gather(*(storages.add([one], one.source) for one in wanted))
    assert (len(mounts.now), most) == (2, 1)


async def test_many_layers_are_named_as_seen_from_where_they_are(
    mounts: Mounts, storages: Storages, tmp_path: Path
) -> None:
    here = os.getcwd()
    parent = tmp_path / ("x" * 60)
    parent.mkdir()
    overlay = pb.Storage(driver="overlayfs", source="overlay", fstype="overlay", mount_point=f"{tmp_path}/o")
    overlay.options[:] = ["lowerdir=" + ":".join(f"{parent}/{number:060}" for number in range(100))]
    with pytest.raises(InvalidRequest, match="100 layers do not fit into one mount"):
        await storages.add([overlay], "a")
    overlay.options[:] = ["lowerdir=" + ":".join(f"{parent}/{number}" for number in range(100))]
    await storages.add([overlay], "a")
    ((_, _, _, options),) = mounts.seen
    assert options == ["lowerdir=" + ":".join(str(number) for number in range(100))]
    assert os.getcwd() == here


async def test_all_or_nothing(mounts: Mounts, storages: Storages, tmp_path: Path) -> None:
    await storages.add([ephemeral(tmp_path / "kept")], "other")
    wanted = [
        ephemeral(tmp_path / "kept"),
        ephemeral(tmp_path / "new"),
        ephemeral(tmp_path / "bad", source="broken"),
    ]
    with pytest.raises(OSError, match="Input/output"):
        await storages.add(wanted, "c")
    assert mounts.now == [f"{tmp_path}/kept"]
    storages.release("other")
    assert mounts.now == []


async def test_mount_points_go_as_they_came(mounts: Mounts, storages: Storages, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    bind = pb.Storage(driver="bind", source=f"{tmp_path}/file", fstype="bind", mount_point=f"{tmp_path}/made")
    await storages.add([ephemeral(tmp_path / "there"), ephemeral(tmp_path / "new"), bind], "c")
    storages.release("c")
    assert sorted(os.listdir(tmp_path)) == ["file", "there"]
    broken = [ephemeral(tmp_path / "new"), ephemeral(tmp_path / "bad", source="broken")]
    with pytest.raises(OSError, match="Input/output"):
        await storages.add(broken, "c")
    assert sorted(os.listdir(tmp_path)) == ["file", "there"]


async def test_what_a_container_left_in_a_volume_that_is_no_mount_is_kept(
    mounts: Mounts, storages: Storages, tmp_path: Path
) -> None:
    await storages.add([ephemeral(tmp_path / "v")], "c")
    (tmp_path / "v/precious").touch()
    storages.release("c")
    assert (tmp_path / "v/precious").exists()


async def test_a_shared_storage_is_the_sandboxs(mounts: Mounts, storages: Storages, tmp_path: Path) -> None:
    await storages.add([ephemeral(tmp_path / "v")], "c1")
    shared = ephemeral(tmp_path / "s")
    shared.shared = True
    await storages.add([shared], "c1")
    storages.release("c1")
    await storages.add([shared], "c2")
    assert mounts.now == [f"{tmp_path}/s"]
    storages.release("c2")
    storages.release(SANDBOX_USER)
    assert mounts.now == []


def test_a_bind_that_cannot_be_restricted_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    now: list[str] = []

    def fail_to_remount(source: str, target: str, fstype: str, flags: int = 0, data: str = "") -> None:
        if flags & syscalls.MS_REMOUNT:
            raise OSError(1, "Operation not permitted", target)
        now.append(target)

    monkeypatch.setattr(syscalls, "mount", fail_to_remount)
    monkeypatch.setattr(syscalls, "umount", lambda target, flags: now.remove(target))
    with pytest.raises(OSError, match="not permitted"):
        mount.mount("/a", "/b", "bind", ["ro"])
    assert now == []


async def test_ephemeral_options_are_applied(mounts: Mounts, storages: Storages, tmp_path: Path) -> None:
    await storages.add([ephemeral(tmp_path / "e", "size=64k", f"fsgid={os.getgid()}")], "a")
    assert mounts.seen[0][3] == ["size=64k"]
    assert (tmp_path / "e").stat().st_mode & 0o7777 == 0o2775
    storages.remount(ephemeral(tmp_path / "e", "size=128k", "fsgid=5"))
    assert mounts.seen[1][3] == ["remount", "size=128k"]


async def test_a_storage_whose_group_cannot_be_set_is_not_left_mounted(
    mounts: Mounts, storages: Storages, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match="'users' is not a number"):
        await storages.add([ephemeral(tmp_path / "e", "fsgid=users")], "a")
    assert mounts.now == []
    assert not (tmp_path / "e").exists()


async def test_local_directories(mounts: Mounts, storages: Storages, tmp_path: Path) -> None:
    local = pb.Storage(driver="local", source="local", mount_point=f"{tmp_path}/l", options=["mode=0777"])
    await storages.add([local], "a")
    assert (tmp_path / "l").stat().st_mode & 0o7777 == 0o777
    assert mounts.seen == []
    local.options[0] = "mode=rwx"
    local.mount_point = f"{tmp_path}/m"
    with pytest.raises(InvalidRequest, match="'rwx' is not a number"):
        await storages.add([local], "a")


async def test_binds_of_files_and_directories(mounts: Mounts, storages: Storages, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, source in (("f/target", "file"), ("d/target", "")):
        await storages.add(
            [
                pb.Storage(
                    driver="bind",
                    source=f"{tmp_path}/{source}",
                    fstype="bind",
                    mount_point=f"{tmp_path}/{name}",
                )
            ],
            name,
        )
    assert (tmp_path / "f/target").is_file()
    assert (tmp_path / "d/target").is_dir()
    assert [seen[2] for seen in mounts.seen] == ["bind", "bind"]


async def test_overlay_directories_are_made(mounts: Mounts, storages: Storages, tmp_path: Path) -> None:
    options = [f"lowerdir={tmp_path}", f"upperdir={tmp_path}/u", f"workdir={tmp_path}/w"]
    overlay = pb.Storage(
        driver="overlayfs", source="overlay", fstype="overlay", mount_point=f"{tmp_path}/o", options=options
    )
    await storages.add([overlay], "a")
    assert (tmp_path / "u").is_dir()
    assert (tmp_path / "w").is_dir()


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        (pb.Storage(driver="floppy", mount_point="/x"), NotSupported, "storage driver 'floppy' for /x"),
        (pb.Storage(driver="local", mount_point="x"), InvalidRequest, "'x' is not an absolute path"),
        (pb.Storage(driver="blk", source="02/01", mount_point="/x"), NotSupported, "by bus address '02/01'"),
        (
            pb.Storage(driver="blk", source="/dev/null", mount_point="/x"),
            InvalidRequest,
            "/dev/null is not a block",
        ),
    ],
)
async def test_refused_storages(
    mounts: Mounts, storages: Storages, wrong: pb.Storage, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        await storages.add([wrong], "a")
    assert mounts.seen == []


def test_only_ephemeral_storages_change(mounts: Mounts, storages: Storages) -> None:
    with pytest.raises(InvalidRequest, match="only ephemeral storages can change"):
        storages.remount(pb.Storage(driver="local", mount_point="/x"))


# Groups of volumes


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    (tmp_path / "v/sub").mkdir(parents=True)
    (tmp_path / "v/sub/file").touch(0o600)
    (tmp_path / "v/link").symlink_to("/etc/passwd")
    return tmp_path / "v"


def test_a_volume_is_given_to_a_group(volume: Path) -> None:
    before = os.stat("/etc/passwd")
    set_group(str(volume), os.getgid(), 0)
    assert volume.stat().st_mode & 0o7777 == 0o2775
    assert (volume / "sub").stat().st_mode & 0o7777 == 0o2775
    assert (volume / "sub/file").stat().st_mode & 0o7777 == 0o660
    assert os.stat("/etc/passwd") == before


def test_a_volume_that_fits_is_left_alone(volume: Path) -> None:
    volume.chmod(0o2775)
    set_group(str(volume), os.getgid(), 1)
    assert (volume / "sub/file").stat().st_mode & 0o7777 == 0o600
    set_group(str(volume), os.getgid(), 0)
    assert (volume / "sub/file").stat().st_mode & 0o7777 == 0o660
