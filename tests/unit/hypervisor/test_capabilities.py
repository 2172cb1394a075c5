"""What is learned of a QEMU, when it is asked, and how answers are kept: with the host's own QEMU, and without any."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisor.arch import arch_named
from hypervisor.errors import BootFailed, HostUnsupported, ProgramNotFound, QmpUnavailable
from hypervisor.qemu import capabilities as module
from hypervisor.qemu.capabilities import Capabilities, capabilities, demand, lacks
from hypervisor.qemu.cmdline import RARE_TYPES, build_cmdline, is_rare, rare_properties_in, types_in
from hypervisor.qemu.machine import booted
from hypervisor.spec import VmSpec
from tests.unit.hypervisor.test_golden import CASES, read_case
from tests.unit.hypervisor.test_qemu_knows import PROGRAMS, knowledge

if TYPE_CHECKING:
    from collections.abc import Callable

QEMU = Path(shutil.which("qemu-system-x86_64") or "/nonexistent")
needs_qemu = pytest.mark.skipif(not QEMU.exists(), reason="qemu-system-x86_64 is not installed")
TYPES = frozenset({"isa-serial", "memory-backend-memfd", "vhost-user-fs-ccw"})
KNOWN = Capabilities((7, 2, 22), TYPES, frozenset({"q35"}), frozenset())


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The programs that were started to be asked; none really is."""
    started: list[Path] = []

    async def ask(qemu: Path, run_dir: Path) -> Capabilities:
        started.append(qemu)
        return KNOWN

    monkeypatch.setattr(module, "_asked", ask)
    return started


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "qemu-system-x86_64"
    path.write_text("#!/bin/true\n")
    return path


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("arch", "program"), [(arch, program) for _, arch, program in PROGRAMS])
async def test_every_qemu_here_answers_as_it_does_by_itself(tmp_path: Path, arch: str, program: str) -> None:
    found = await capabilities(Path(program), tmp_path, cache=tmp_path / "cache")
    known = knowledge(program)
    assert found.version[:2] == known.version
    assert found.types == known.types
    assert found.machines == known.machines.keys() - {None}
    assert {"q35", "virt", "s390-ccw-virtio"} & found.machines, arch
    assert os.listdir(tmp_path) == ["cache"]


@pytest.mark.usefixtures("asked")
async def test_an_answer_is_kept_for_nobody_else(tmp_path: Path, qemu: Path) -> None:
    cache = tmp_path / "a" / "b"
    await capabilities(qemu, tmp_path, cache=cache)
    (file,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.name.endswith("-qemu-system-x86_64.json")


async def test_a_program_is_asked_once(tmp_path: Path, qemu: Path, asked: list[Path]) -> None:
    for _ in range(3):
        assert await capabilities(qemu, tmp_path, cache=tmp_path / "cache") == KNOWN
    assert asked == [qemu]


def newer(qemu: Path, file: Path) -> None:
    os.utime(qemu, ns=(1, 1))


def longer(qemu: Path, file: Path) -> None:
    status = qemu.stat()
    qemu.write_text("#!/bin/false\n# \n")
    os.utime(qemu, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut_short(qemu: Path, file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def of_another_shape(qemu: Path, file: Path) -> None:
    file.write_text('{"program": 3}')


def writable_for_others(qemu: Path, file: Path) -> None:
    file.chmod(0o666)


def somebody_elses(qemu: Path, file: Path) -> None:
    os.chown(file, 12345, 12345)


def a_link(qemu: Path, file: Path) -> None:
    file.rename(file.with_suffix(".real"))
    file.symlink_to(file.with_suffix(".real"))


def a_pipe(qemu: Path, file: Path) -> None:
    file.unlink()
    os.mkfifo(file, 0o600)


@pytest.mark.parametrize(
    "change",
    [newer, longer, cut_short, of_another_shape, writable_for_others, somebody_elses, a_link, a_pipe],
)
async def test_it_is_asked_again(
    tmp_path: Path, qemu: Path, asked: list[Path], change: Callable[[Path, Path], None]
) -> None:
    if change is somebody_elses and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    cache = tmp_path / "cache"
    await capabilities(qemu, tmp_path, cache=cache)
    (file,) = cache.iterdir()
    change(qemu, file)
    for _ in range(2):
        assert await capabilities(qemu, tmp_path, cache=cache) == KNOWN
    assert asked == [qemu, qemu]


async def test_without_a_place_for_answers_it_is_asked_each_time(
    tmp_path: Path, qemu: Path, asked: list[Path]
) -> None:
    (tmp_path / "cache").touch()
    for _ in range(2):
        await capabilities(qemu, tmp_path, cache=tmp_path / "cache")
    assert asked == [qemu, qemu]


@pytest.mark.parametrize(
    ("xdg", "home", "uid", "place"),
    [
        ("/x", "/home/me", 0, "/x/kata-py"),
        ("/x", "/home/me", 5, "/x/kata-py"),
        (None, "/root", 0, "/var/cache/kata-py"),
        ("", "/home/me", 5, "/home/me/.cache/kata-py"),
    ],
)
def test_where_answers_are_kept(
    monkeypatch: pytest.MonkeyPatch, xdg: str | None, home: str, uid: int, place: str
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if xdg is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    assert module._cache_dir() == Path(place)


async def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProgramNotFound, match="cannot start /nowhere/qemu: No such file"):
        await capabilities(Path("/nowhere/qemu"), tmp_path, cache=tmp_path)


async def test_a_program_that_is_no_qemu_is_told(tmp_path: Path, qemu: Path) -> None:
    qemu.chmod(0o755)
    with pytest.raises(QmpUnavailable, match="ended before its monitor answered"):
        await capabilities(qemu, tmp_path, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("argv", "lacking"),
    [
        ([], []),
        (
            ["-device", "isa-serial,chardev=c", "-object", "memory-backend-memfd,id=mem", "-machine", "q35"],
            [],
        ),
        (["-machine", "microvm,acpi=on"], ["machine microvm"]),
        (
            ["-object", "tdx-guest,id=tdx0", "-device", "vhost-user-fs-pci,tag=t"],
            ["object tdx-guest", "device vhost-user-fs-pci"],
        ),
        (
            ["-object", '{"qom-type":"tdx-guest","id":"a,b"}', "-device", '{"driver":"isa-serial"}'],
            ["object tdx-guest"],
        ),
        (
            ["-device", "vhost-user-fs-ccw,tag=a,,cache-size=1,cache-size=1G"],
            ["property cache-size of vhost-user-fs-ccw"],
        ),
        (["-device", "vhost-user-fs-ccw,tag=a,,cache-size=1"], []),
        (["-name", "tdx-guest", "-append", "tdx-guest", "-nodefaults"], []),
    ],
)
def test_what_is_lacking(argv: list[str], lacking: list[str]) -> None:
    found = list(lacks(["/usr/bin/qemu", *argv], KNOWN))
    assert [lack.what for lack in found] == lacking
    assert all(lack.remedy for lack in found)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("name", RARE_TYPES)
async def test_the_refusal_says_what_there_is_and_what_is_needed(
    tmp_path: Path, qemu: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(HostUnsupported) as told:
        await demand([str(qemu), "-object", f"{name},id=x"], tmp_path)
    assert str(told.value) == f"QEMU 7.2.22 at {qemu} has no object {name}; {RARE_TYPES[name]}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("arch", "program"), [(arch, program) for _, arch, program in PROGRAMS])
async def test_a_window_for_shared_files_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arch: str, program: str
) -> None:
    """By every QEMU here, as none has it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = f"{arch_named(arch).devices.fs},chardev=fs0,tag=t,cache-size=1G"
    with pytest.raises(HostUnsupported) as told:
        await demand([program, "-device", device], tmp_path)
    assert str(told.value).endswith(
        f" at {program} has no property cache-size of {arch_named(arch).devices.fs}; "
        "set virtio_fs_cache_size to 0; virtio_fs_cache decides what is cached"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.stem}")
def test_only_command_lines_with_rare_types_have_qemu_asked_first(case: Path) -> None:
    spec, fds = read_case(case)
    argv = build_cmdline(spec, fds)
    rare = {name for _, name in types_in(argv) if name in RARE_TYPES} | {*rare_properties_in(argv)}
    assert is_rare(argv) == bool(rare)
    memory = spec.virtio_mem and spec.arch == "s390x"
    window = any(share.dax_mib for share in spec.shares)
    expected = spec.protection is not None or memory or window or fds.iommufd is not None
    assert bool(rare) == expected, rare


@needs_qemu
async def test_a_failed_start_is_explained_by_what_qemu_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "vmlinux").touch()
    spec = VmSpec(
        name="sandbox-test",
        run_dir=tmp_path / "run",
        qemu_path=QEMU,
        kernel=tmp_path / "vmlinux",
        machine_type="pc-q35-99.0",
        vsock=None,
    )
    with pytest.raises(HostUnsupported) as told:
        async with booted(spec):
            pass
    words = r"QEMU [\d.]+ at \S+ has no machine pc-q35-99\.0; install the distribution's full QEMU"
    assert re.fullmatch(words, str(told.value))
    assert isinstance(told.value.__cause__, BootFailed)


async def test_a_rare_type_is_looked_for_before_the_start(
    tmp_path: Path, asked: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU itself is not started: this one could not be. Without a rare type nobody is asked."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    qemu = tmp_path / "qemu"
    for name in ("vmlinux", "qemu"):
        (tmp_path / name).touch()
    spec = VmSpec(name="s", run_dir=tmp_path / "run", qemu_path=qemu, kernel=tmp_path / "vmlinux", vsock=None)
    with pytest.raises(ProgramNotFound):
        async with booted(spec):
            pass
    assert asked == []
    monkeypatch.setattr(
        "hypervisor.qemu.machine.build_cmdline", lambda *_: [str(qemu), "-object", "tdx-guest,id=x"]
    )
    with pytest.raises(HostUnsupported, match=r"has no object tdx-guest; install QEMU 10\.1"):
        async with booted(spec):
            pass
    assert asked == [qemu]
