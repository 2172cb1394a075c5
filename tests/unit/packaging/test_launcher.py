"""The launchers: what they may import, from where, and which paths they refuse."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import launcher
import pytest

PYTHON = Path(sys.executable)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A folder with a shim that tells how it was started."""
    folder = tmp_path / "our packages"
    (folder / "shim").mkdir(parents=True)
    (folder / "shim" / "__init__.py").touch()
    (folder / "shim" / "cli.py").write_text(
        "import sys\n"
        "def main():\n"
        "    print(__file__, 'site' in sys.modules, sys.flags.isolated, *sys.argv[1:], sep='|')\n"
    )
    return folder


def test_imports_only_from_its_own_folders(tmp_path: Path, packages: Path) -> None:
    shim, alias, *_ = launcher.write_all(tmp_path / "bin", python=PYTHON, folders=[packages])
    decoy = tmp_path / "bundle"
    (decoy / "shim").mkdir(parents=True)
    (decoy / "shim" / "cli.py").write_text("def main(): print('the bundle was imported')\n")
    for program in (shim, alias):
        said = subprocess.run(
            [program, "-id", "a b", "start"],
            cwd=decoy,
            env={**os.environ, "PYTHONPATH": str(decoy), "PYTHONHOME": "/nowhere"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert said == f"{packages}/shim/cli.py|False|1|-id|a b|start\n"


def test_rewriting_changes_nothing_and_moving_does(tmp_path: Path) -> None:
    shim, alias, tool, runtime = launcher.write_all(tmp_path, python=PYTHON, folders=[Path("/a")])
    before = [path.lstat().st_ino for path in (shim, alias, tool, runtime)]
    launcher.write_all(tmp_path, python=PYTHON, folders=[Path("/a")])
    assert [path.lstat().st_ino for path in (shim, alias, tool, runtime)] == before
    launcher.write_all(tmp_path, python=PYTHON, folders=[Path("/b")])
    assert "['/b']" in shim.read_text()
    assert shim.stat().st_ino != before[0]
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*launcher.SHIM_NAMES, launcher.TOOL_NAME, launcher.RUNTIME_NAME]
    )


def test_alias_is_repaired(tmp_path: Path) -> None:
    (tmp_path / launcher.SHIM_NAMES[1]).write_text("an old copy")
    _, alias, *_ = launcher.write_all(tmp_path, python=PYTHON, folders=[])
    assert os.readlink(alias) == launcher.SHIM_NAMES[0]


@pytest.mark.parametrize(
    ("python", "problem"),
    [
        ("/home/My Files/.venv/bin/python", "white space"),
        ("/home/a\tb/python", "white space"),
        ("/" + "x" * 250 + "/python", "too long"),
        ("/" + "\N{LATIN SMALL LETTER E WITH ACUTE}" * 125 + "/python", "too long"),
    ],
)
def test_impossible_first_lines_are_refused(python: str, problem: str) -> None:
    with pytest.raises(launcher.LauncherError, match=problem):
        launcher.render(launcher.SHIM_SOURCE, python=Path(python), folders=[])


@pytest.mark.parametrize("length", [launcher.SHEBANG_LIMIT - 1, launcher.SHEBANG_LIMIT])
def test_limit_of_the_first_line(length: int) -> None:
    python = Path("/" + "x" * (length - len("#!/ -IS")))
    if length < launcher.SHEBANG_LIMIT:
        assert launcher.render("#!{python} -IS\n{folders}", python=python, folders=[]).startswith("#!/xxx")
    else:
        with pytest.raises(launcher.LauncherError):
            launcher.render("#!{python} -IS\n{folders}", python=python, folders=[])


def test_program_reports_the_problem_in_one_line(tmp_path: Path) -> None:
    link = tmp_path / "with space" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    done = subprocess.run(
        [link, launcher.__file__, tmp_path / "bin"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("launcher: ")
    assert done.stderr.count("\n") == 1
