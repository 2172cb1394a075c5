"""Installation into a stage and back: what was there before is there afterwards, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import install
import pytest
import python_env


@pytest.fixture
def guest(tmp_path: Path) -> Path:
    folder = tmp_path / "guest"
    folder.mkdir()
    for name in install.GUEST_FILES:
        (folder / name).write_text(f"first {name}")
    return folder


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> install.Places:
    """A stage with a system in it; one small package keeps compiling short."""
    stage = tmp_path / "stage"
    for folder in ("etc", "usr/local/bin", "usr/share"):
        (stage / folder).mkdir(parents=True)
    (stage / "usr/local/bin/other").write_text("somebody else's")
    monkeypatch.setattr(python_env, "PACKAGES", ("cli",))
    return install.Places(Path("/usr/local"), stage)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run_install(places: install.Places, guest: Path) -> list[str]:
    return install.install(
        places, guest=guest, add_dependencies=lambda library: (library / "dependency.py").touch()
    )


def test_uninstall_restores_the_system(places: install.Places, guest: Path) -> None:
    before = tree(places.destdir)
    run_install(places, guest)
    installed = tree(places.destdir)
    assert {
        "etc/kata-py/configuration.toml",
        "usr/share/defaults/kata-py/configuration-qemu-se.toml",
        "usr/share/defaults/kata-py/configuration-qemu-snp.toml",
        "usr/share/defaults/kata-py/configuration-qemu-tdx.toml",
        "usr/share/defaults/kata-py/configuration.toml",
        "usr/share/kata-py/vmlinux",
        "usr/local/bin/containerd-shim-kata-py",
        "usr/local/bin/containerd-shim-kata-py-v2",
        "usr/local/bin/kata-py",
        "usr/local/lib/kata-py/cli/main.py",
        "usr/local/lib/kata-py/dependency.py",
    } <= installed
    assert not [name for name in installed if name.endswith(".new")]
    cached = places.staged(places.cache) / "usr-bin-qemu-system-x86_64.json"
    cached.parent.mkdir(parents=True)
    cached.touch()
    install.uninstall(places)
    cached.parent.parent.rmdir()
    cached.parent.parent.parent.rmdir()
    assert tree(places.destdir) == before


def test_revision_of_the_checkout_is_kept(places: install.Places, guest: Path, tmp_path: Path) -> None:
    run_install(places, guest)
    kept = (places.staged(places.lib) / "REVISION").read_text()
    assert kept == install.revision(install.ROOT)
    # A release's archive has no history: that is no reason to fail.
    assert install.revision(tmp_path) == ""


def test_stage_is_not_named_anywhere(places: install.Places, guest: Path) -> None:
    run_install(places, guest)
    stage = os.fsencode(places.destdir)
    files = [path for path in places.destdir.rglob("*") if path.is_file()]
    assert [path for path in files if stage in path.read_bytes()] == []


def test_repeating_replaces_guest_and_library(places: install.Places, guest: Path) -> None:
    run_install(places, guest)
    stale = places.staged(places.lib) / "cli" / "stale.py"
    stale.touch()
    (guest / "vmlinux").write_text("second")
    run_install(places, guest)
    assert not stale.exists()
    assert places.staged(places.guest / "vmlinux").read_text() == "second"
    install.uninstall(places)
    assert tree(places.destdir) == {
        "etc",
        "usr",
        "usr/local",
        "usr/local/bin",
        "usr/local/bin/other",
        "usr/share",
    }


def test_library_in_its_place_is_always_whole(
    places: install.Places, guest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_install(places, guest)
    library = places.staged(places.lib)
    remove = shutil.rmtree

    def watched(folder: Path, **options: Any) -> None:
        assert folder != library
        remove(folder, **options)
        assert {"cli", "dependency.py"} <= {path.name for path in library.iterdir()}

    monkeypatch.setattr(shutil, "rmtree", watched)
    run_install(places, guest)
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_who_uses_an_old_file_keeps_it(places: install.Places, guest: Path) -> None:
    run_install(places, guest)
    kernel, program, module = (
        places.staged(places.guest / "vmlinux"),
        places.staged(places.bin / "containerd-shim-kata-py-v2"),
        places.staged(places.lib / "cli" / "main.py"),
    )
    program.write_text("#!/bin/sh\n# an older one\n")
    opened = [path.open("rb") for path in (kernel, program, module)]
    before = [os.fstat(file.fileno()) for file in opened]
    (guest / "vmlinux").write_text("second")
    run_install(places, guest)
    for path, file, old in zip((kernel, program, module), opened, before, strict=True):
        assert path.stat().st_ino != old.st_ino
        assert len(file.read()) == old.st_size
        file.close()


def test_edited_configuration_survives(places: install.Places, guest: Path) -> None:
    run_install(places, guest)
    etc = places.staged(places.etc)
    etc.write_text("# mine\n")
    assert any("edited" in line for line in run_install(places, guest))
    assert etc.read_text() == "# mine\n"
    assert any("edited" in line for line in install.uninstall(places))
    assert etc.read_text() == "# mine\n"
    assert not places.staged(places.defaults).exists()


def test_configuration_that_was_there_before_counts_as_edited(places: install.Places, guest: Path) -> None:
    etc = places.staged(places.etc)
    etc.parent.mkdir()
    etc.write_text("# older than we are\n")
    run_install(places, guest)
    install.uninstall(places)
    assert etc.read_text() == "# older than we are\n"


def test_unedited_configuration_follows_a_new_version(
    places: install.Places, guest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_install(places, guest)
    newer = tmp_path / "newer.toml"
    newer.write_text("# a newer version\n")
    monkeypatch.setattr(install, "CONFIGURATION", newer)
    run_install(places, guest)
    assert places.staged(places.etc).read_text() == "# a newer version\n"


def test_failing_dependencies_keep_the_installation(places: install.Places, guest: Path) -> None:
    run_install(places, guest)

    def fail(library: Path) -> None:
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        install.install(places, guest=guest, add_dependencies=fail)
    assert (places.staged(places.lib) / "dependency.py").exists()
    install.uninstall(places)
    assert not places.staged(places.lib).exists()


def test_nothing_to_uninstall(places: install.Places) -> None:
    assert install.uninstall(places) == ["nothing is installed in /usr/local"]


def test_library_tells_its_version(places: install.Places, guest: Path) -> None:
    run_install(places, guest)
    version = python_env.project_table()["version"]
    metadata = places.staged(places.lib) / f"kata_py-{version}.dist-info" / "METADATA"
    assert f"Version: {version}" in metadata.read_text()
    record = json.loads((places.staged(places.lib) / install.RECORD).read_text())
    assert "/usr/local/bin" not in record["folders"]
