"""The program that containerd finds when it starts again after kata-py has been removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import shim
from shim import stand_in


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle as containerd makes it, with the installed program's path in it."""
    work, bundle = tmp_path / "work of it", tmp_path / "bundle"
    work.mkdir()
    bundle.mkdir()
    (bundle / "work").symlink_to(work)
    (bundle / "shim-binary-path").write_text("/usr/local/bin/containerd-shim-kata-py-v2")
    return bundle


def noted(bundle: Path) -> Path:
    return Path((bundle / "shim-binary-path").read_text())


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *words], capture_output=True, text=True, check=False)


def test_containerd_finds_a_program_of_ours(bundle: Path) -> None:
    stand_in.put_in_place(bundle)
    program = noted(bundle)
    assert program.parent == (bundle / "work").resolve()
    assert not program.is_relative_to(bundle)
    assert shim.VERSION in run(program, "-v").stdout


def test_nothing_but_the_two_files(bundle: Path) -> None:
    stand_in.put_in_place(bundle)
    stand_in.put_in_place(bundle)
    assert {path.name for path in bundle.iterdir()} == {"work", "shim-binary-path"}
    assert [path.name for path in (bundle / "work").iterdir()] == [stand_in.NAME]


def test_bundle_that_joined_a_running_shim_gets_a_note(bundle: Path) -> None:
    (bundle / "shim-binary-path").unlink()
    stand_in.put_in_place(bundle)
    assert noted(bundle).exists()


def test_bundle_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    stand_in.put_in_place(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_containerds_note(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "work of it").rmdir()
    before = noted(bundle)
    stand_in.put_in_place(bundle)
    assert noted(bundle) == before


def test_without_the_files_it_says_so_in_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "__file__", "/nowhere/kata-py/shim/stand_in.py")
    stand_in.put_in_place(bundle)
    done = run(noted(bundle), "-id", "c", "delete")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "kata-py is no longer in /nowhere/kata-py" in line


def test_interpreter_is_not_that_of_an_environment(bundle: Path) -> None:
    stand_in.put_in_place(bundle)
    first_line = noted(bundle).read_text().splitlines()[0]
    assert first_line == f"#!{Path(sys.executable).resolve()} -IS"
