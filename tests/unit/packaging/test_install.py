"""Installation into a stage and back: what was there before is there afterwards, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

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
        "usr/share/defaults/kata-py/configuration.toml",
        "usr/share/kata-py/vmlinux",
        "usr/local/bin/containerd-shim-kata-py",
        "usr/local/bin/containerd-shim-kata-py-v2",
        "usr/local/bin/kata-py",
        "usr/local/lib/kata-py/cli/main.py",
        "usr/local/lib/kata-py/dependency.py",
    } <= installed
    assert not [name for name in installed if name.endswith(".new")]
    install.uninstall(places)
    assert tree(places.destdir) == before


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
