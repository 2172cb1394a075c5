"""When pip has to run, and for what."""

from __future__ import annotations

from pathlib import Path

import pytest
import python_env

PYPROJECT = """\
[project]
name = "x"
version = "1"
dependencies = ["a>=1", "b"]
[project.optional-dependencies]
dev = ["c"]
"""


@pytest.fixture
def pyproject(tmp_path: Path) -> Path:
    path = tmp_path / "pyproject.toml"
    path.write_text(PYPROJECT)
    return path


@pytest.mark.parametrize(("dev", "wanted"), [(False, ["a>=1", "b"]), (True, ["a>=1", "b", "c"])])
def test_requirements(pyproject: Path, dev: bool, wanted: list[str]) -> None:
    assert python_env.requirements(pyproject, dev=dev) == wanted


def test_fingerprint_follows_requirements_and_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = python_env.fingerprint(["a", "b"])
    assert python_env.fingerprint(["b", "a"]) == mark
    assert python_env.fingerprint(["a"]) != mark
    monkeypatch.setattr("sys.version", "3.99")
    assert python_env.fingerprint(["a", "b"]) != mark


def test_pip_runs_once_per_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[object]] = []
    monkeypatch.setattr("subprocess.run", lambda argv, check: calls.append(argv))
    python_env.ensure_packages(tmp_path, dev=False)
    python_env.ensure_packages(tmp_path, dev=False)
    assert len(calls) == 1
    assert calls[0][:4] == [tmp_path / "bin" / "python", "-m", "pip", "install"]
    assert (
        calls[0][-len(python_env.project_table()["dependencies"]) :]
        == python_env.project_table()["dependencies"]
    )
    python_env.ensure_packages(tmp_path, dev=True)
    assert len(calls) == 2


def test_failed_pip_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: object, check: bool) -> None:
        raise OSError("no network")

    monkeypatch.setattr("subprocess.run", fail)
    with pytest.raises(OSError, match="no network"):
        python_env.ensure_packages(tmp_path, dev=False)
    assert list(tmp_path.iterdir()) == []


def test_every_package_exists() -> None:
    assert [
        name for name in python_env.PACKAGES if not (python_env.ROOT / name / "__init__.py").exists()
    ] == []


def test_unusable_folders_are_recognised(tmp_path: Path) -> None:
    assert not python_env.usable(tmp_path / "absent")
    assert not python_env.usable(tmp_path)
    assert python_env.usable(python_env.ROOT / ".venv") == (Path(python_env.ROOT) / ".venv").exists()
