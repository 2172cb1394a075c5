"""QEMUs of other releases: which packages, and a script that starts nothing of the host's."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import qemu_versions
from qemu_versions import QemuError

from guest_image.apt import Package
from guest_image.errors import ToolFailed
from guest_image.tools import Root

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

HOSTS = b"/usr/lib/x86_64-linux-gnu/qemu\0"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """An unpacked QEMU; its loader says how it was called."""
    path = tmp_path / "a root"
    library = path / "usr/lib/x86_64-linux-gnu"
    (library / "qemu").mkdir(parents=True)
    loader = library / "ld-linux-x86-64.so.2"
    loader.write_text('#!/bin/sh\necho "$QEMU_MODULE_DIR"\nfor word; do echo "$word"; done\n')
    loader.chmod(0o755)
    (path / "usr/bin").mkdir()
    (path / "usr/bin/qemu-system-aarch64").write_bytes(b"ELF" + HOSTS + b"rest")
    return Root(path, "amd64", {})


def test_the_script_has_everything_of_its_own(root: Root, tmp_path: Path) -> None:
    script = qemu_versions.launcher(root, "aarch64", tmp_path / "qemu-system-aarch64")
    said = subprocess.run([script, "-M", "a b"], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert said[0] == str(root.path / "usr/lib/x86_64-linux-gnu/qemu")
    assert said[1] == "--library-path"
    assert said[3] == str(tmp_path / "qemu-system-aarch64.program")
    assert said[4:6] == ["-L", str(root.path / "usr/share/qemu")]
    assert said[-3:-1] == ["-M", "a b"]


def test_the_copy_does_not_know_the_hosts_modules(root: Root, tmp_path: Path) -> None:
    qemu_versions.launcher(root, "aarch64", tmp_path / "qemu")
    original = (root.path / "usr/bin/qemu-system-aarch64").read_bytes()
    copy = (tmp_path / "qemu.program").read_bytes()
    assert HOSTS not in copy
    assert (len(copy), copy[:3], copy[-4:]) == (len(original), b"ELF", b"rest")


def test_what_does_not_run_is_removed(root: Root, tmp_path: Path) -> None:
    library = root.path / "usr/lib/x86_64-linux-gnu"
    script = qemu_versions.launcher(root, "aarch64", tmp_path / "qemu-system-aarch64")
    for name in (
        "usr/share/doc/qemu/index",
        "usr/share/qemu/s390-ccw.img",
        "usr/lib/x86_64-linux-gnu/gconv/x.so",
        "usr/lib/x86_64-linux-gnu/qemu/accel-tcg.so",
        "usr/lib/x86_64-linux-gnu/libc.so.6",
        "etc/passwd",
        "made",
    ):
        (root.path / name).parent.mkdir(parents=True, exist_ok=True)
        (root.path / name).write_text("x")
    qemu_versions.keep_what_runs(root, root.path / "made")
    left = {str(path.relative_to(root.path)) for path in root.path.rglob("*") if path.is_file()}
    assert left == {
        "usr/share/qemu/s390-ccw.img",
        "usr/lib/x86_64-linux-gnu/qemu/accel-tcg.so",
        "usr/lib/x86_64-linux-gnu/libc.so.6",
        f"usr/lib/x86_64-linux-gnu/{(library / 'ld-linux-x86-64.so.2').name}",
        "made",
    }
    subprocess.run([script, "--version"], capture_output=True, check=True)


class Mirror:
    """What of apt is used to choose a package."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def closure(self, names: Sequence[str]) -> list[Package]:
        if names[0] not in self.names:
            raise ToolFailed("no such package")
        return [Package(names[0], "1", "f", 1, "s")]


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        (("qemu-system-s390x", "qemu-system-misc"), "qemu-system-s390x"),
        (("qemu-system-misc",), "qemu-system-misc"),
    ],
)
def test_the_package_that_the_suite_has(offered: tuple[str, ...], chosen: str) -> None:
    mirror: Any = Mirror(*offered)
    assert qemu_versions.packaged(mirror, qemu_versions.PACKAGES["s390x"]) == chosen


def test_a_mirror_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object, **options: object) -> bytes:
        raise ToolFailed("apt-get ... failed: the end", ("E: Unable to locate package qemu", "the end"))

    monkeypatch.setattr("guest_image.apt.Apt.refresh", lambda self, progress: None)
    monkeypatch.setattr("guest_image.apt.run", fail)
    with pytest.raises(QemuError) as caught:
        list(qemu_versions.fetched("sid", tmp_path))
    assert str(caught.value) == "cannot get QEMU of Debian sid: E: Unable to locate package qemu"
