"""Which user QEMU gets, and what it could not open as that one."""

from __future__ import annotations

import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import HostUnsupported, InvalidSpec
from hypervisor.extension import Extension
from hypervisor.rootless import FIRST_ID, IDS, User, check, choose_user
from hypervisor.spec import Export, VmSpec

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root gives files away and starts programs as others"
)
SOMEBODY = User(uid=FIRST_ID + 1, gid=FIRST_ID + 1)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    for name in ("proc/1", "proc/22", "proc/self", "dev"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "dev/kvm").touch()
    return tmp_path


def expected(sandbox_id: str, offset: int = 0) -> int:
    return FIRST_ID + (zlib.crc32(sandbox_id.encode()) + offset) % IDS


def test_a_user_of_its_own(host: Path) -> None:
    users = {choose_user(name, "tcg", root=host) for name in ("s1", "s2", "s3" * 40)}
    assert users == {User(uid=(n := expected(name)), gid=n) for name in ("s1", "s2", "s3" * 40)}
    assert all(FIRST_ID <= user.uid < FIRST_ID + IDS for user in users)
    assert FIRST_ID + IDS < 2**31 - 2**17  # where systemd's list has the next use


@needs_root
@pytest.mark.parametrize("others", [1, 2])
def test_users_of_running_processes_are_left_to_them(host: Path, others: int) -> None:
    for offset, name in zip(range(others), ("proc/1", "proc/22"), strict=False):
        os.chown(host / name, expected("s1", offset), 0)
    os.chown(host / "proc/self", expected("s1", others), 0)  # a name that is no process
    assert choose_user("s1", "tcg", root=host).uid == expected("s1", others)


@needs_root
@pytest.mark.parametrize(
    ("mode", "group", "groups"),
    [
        (0o666, 0, ()),
        (0o666, 104, ()),
        (0o660, 104, (104,)),
        (0o660, 0, None),
        (0o600, 104, None),
        (0o640, 104, None),
    ],
)
def test_the_group_for_kvm(host: Path, mode: int, group: int, groups: tuple[int, ...] | None) -> None:
    os.chown(host / "dev/kvm", 0, group)
    (host / "dev/kvm").chmod(mode)
    assert choose_user("s1", "tcg", root=host).groups == ()
    if groups is not None:
        assert choose_user("s1", "kvm", root=host).groups == groups
        return
    with pytest.raises(HostUnsupported, match=r"/dev/kvm is open to root only .*; give it to the group kvm"):
        choose_user("s1", "kvm", root=host)


@pytest.fixture
def spec() -> VmSpec:
    """A machine of files that everybody may open."""
    return VmSpec(name="s", run_dir=Path("/run"), qemu_path=Path("/bin/true"), kernel=Path("/etc/passwd"))


@needs_root
async def test_what_everybody_may_open(spec: VmSpec) -> None:
    more = replace(
        spec, initrd=Path("/etc/group"), memory_dir=Path("/dev/shm"), entropy_source=Path("/dev/urandom")
    )
    await check(more, SOMEBODY)


@needs_root
@pytest.mark.parametrize(
    ("field", "verb"),
    [
        ("qemu_path", "run"),
        ("kernel", "read"),
        ("initrd", "read"),
        ("image", "read"),
        ("firmware", "read"),
        ("entropy_source", "read"),
        ("memory_dir", "write to"),
        ("pflash", "read"),
        ("extensions", "read"),
    ],
)
async def test_what_only_root_may_open(spec: VmSpec, tmp_path: Path, field: str, verb: str) -> None:
    """The file itself is open to all, the folder above it is not."""
    tmp_path.chmod(0o700)
    path = tmp_path / "file"
    path.mkdir() if field == "memory_dir" else path.touch()
    path.chmod(0o777)
    values: dict[str, Any] = {
        "pflash": (Path("/etc/passwd"), path),
        "extensions": (Extension(name="x", image=path),),
    }
    with pytest.raises(HostUnsupported) as told:
        await check(replace(spec, **{field: values.get(field, path)}), SOMEBODY)
    assert str(told.value) == (
        f"QEMU cannot {verb} {path} as another user than root; "
        "open it and its folders to all users, or remove rootless"
    )


@needs_root
async def test_a_group_may_be_enough(spec: VmSpec, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(mode=0o640)
    os.chown(file, 0, 104)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_mode & 0o005 != 0o005:
            folder.chmod(0o755)
        if folder.name.startswith("pytest-of"):
            break
    more = replace(spec, kernel=file)
    with pytest.raises(HostUnsupported):
        await check(more, SOMEBODY)
    await check(more, replace(SOMEBODY, groups=(104,)))


@pytest.mark.parametrize(
    ("fields", "key"),
    [({"hugepages": True}, "enable_hugepages"), ({"extra_monitor": "hmp"}, "extra_monitor_socket")],
)
async def test_what_only_root_can_do(spec: VmSpec, fields: dict[str, Any], key: str) -> None:
    with pytest.raises(InvalidSpec, match=f"remove {key} or rootless"):
        await check(replace(spec, **fields), SOMEBODY)


async def test_qemu_cannot_serve_files_as_another_user(spec: VmSpec) -> None:
    exported = replace(spec, arch="s390x", exports=(Export(tag="t", directory=Path("/srv")),))
    with pytest.raises(
        InvalidSpec,
        match='guests with s390x get theirs from QEMU; remove rootless or set shared_fs to "none"',
    ):
        await check(exported, SOMEBODY)
