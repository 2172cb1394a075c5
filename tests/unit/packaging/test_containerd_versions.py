"""The run over all versions of containerd: which are fetched, what pytest is told, and what counts as failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import containerd_versions
import pytest
from containerd_versions import Containerd, Result, VersionsError

from guest_image.errors import ToolFailed
from guest_image.tools import LOADERS, Root, host_arch

if TYPE_CHECKING:
    from collections.abc import Callable

OWN = Containerd("1.6.20", "host")
REPORT = """\
<testsuites><testsuite tests="10" failures="{failures}" errors="1" skipped="2" time="61.5"/></testsuites>
"""


@pytest.mark.parametrize(
    ("debian", "expected"),
    [
        ("1.6.20~ds1-1+deb12u1", "1.6.20"),
        ("2.1.9+ds1-5", "2.1.9"),
        ("1:2.2.0~rc.1-1", "2.2.0"),
        ("1.7.24-1", "1.7.24"),
        ("2.0.0", "2.0.0"),
    ],
)
def test_upstreams_version(debian: str, expected: str) -> None:
    assert containerd_versions.upstream(debian) == expected


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A mirror with three suites; the list tells which were asked for."""
    asked: list[str] = []
    offered = {"bookworm": "1.6.20", "trixie": "1.7.24", "sid": "2.1.9"}

    def fetched(suite: str) -> Containerd:
        asked.append(suite)
        return Containerd(offered[suite], suite, Path("/somewhere") / suite)

    monkeypatch.setattr(containerd_versions, "fetched", fetched)
    return asked


@pytest.mark.parametrize(
    ("host", "versions", "suites"),
    [
        ("1.6.33", ["1.7.24", "2.1.9"], ["trixie", "sid"]),
        ("1.7.24", ["1.6.20", "2.1.9"], ["bookworm", "sid"]),
        # Looked at, because sid may have moved on; but not tested twice.
        ("2.1.9", ["1.6.20", "1.7.24"], ["bookworm", "trixie", "sid"]),
        ("2.1.0", ["1.6.20", "1.7.24", "2.1.9"], ["bookworm", "trixie", "sid"]),
    ],
)
def test_no_version_twice(mirror: list[str], host: str, versions: list[str], suites: list[str]) -> None:
    found = [each.version for each in containerd_versions.others(Containerd(host, "host"))]
    assert (found, mirror) == (versions, suites)


def test_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object, **options: object) -> bytes:
        raise ToolFailed("apt-get ... failed: the end", ("E: Unable to locate package containerd", "the end"))

    monkeypatch.setattr(containerd_versions, "CACHE", tmp_path)
    monkeypatch.setattr("guest_image.apt.Apt.refresh", lambda self, progress: None)
    monkeypatch.setattr("guest_image.apt.run", fail)
    with pytest.raises(VersionsError) as caught:
        containerd_versions.fetched("sid")
    assert str(caught.value) == "cannot get containerd of Debian sid: E: Unable to locate package containerd"


def test_a_program_of_another_release_has_its_own_libraries(tmp_path: Path) -> None:
    root = Root(tmp_path / "its root", host_arch(), {})
    for folder in root.library_dirs():
        folder.mkdir(parents=True, exist_ok=True)
    loader = root.library_dirs()[0] / LOADERS[host_arch()][1]
    loader.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    loader.chmod(0o755)
    script = tmp_path / "mkfs.erofs"
    containerd_versions.launcher(root, tmp_path / "its root" / "mkfs.erofs", script)
    said = subprocess.run([script, "--tar=f", "a b"], capture_output=True, text=True, check=True).stdout
    option, libraries, program, *words = said.splitlines()
    assert option == "--library-path"
    assert libraries.split(":")[0] == str(loader.parent)
    assert (program, words) == (f"{tmp_path}/its root/mkfs.erofs", ["--tar=f", "a b"])


Runs = list[tuple[Containerd, str, tuple[str, ...]]]


@pytest.fixture
def runs(
    monkeypatch: pytest.MonkeyPatch, mirror: list[str]
) -> Callable[..., Runs]:  # takes the exit status that each run ends with
    def prepare(**status: int) -> Runs:
        seen: Runs = []

        def run_tests(containerd: Containerd, selection: str, arguments: list[str]) -> Result:
            seen.append((containerd, selection, tuple(arguments)))
            return Result(containerd, status.get(containerd.source, 0))

        monkeypatch.setattr(containerd_versions, "hosts_own", lambda: OWN)
        monkeypatch.setattr(containerd_versions, "run_tests", run_tests)
        return seen

    return prepare


def test_only_the_hosts_own_runs_everything_in_the_short_form(runs: Callable[..., Runs]) -> None:
    seen = runs()
    assert containerd_versions.test_all(["-x"], short=True)
    short = "integration and not one_version"
    assert [(each.version, selection) for each, selection, _ in seen] == [
        ("1.6.20", "integration"),
        ("1.7.24", short),
        ("2.1.9", short),
    ]
    assert {arguments for _, _, arguments in seen} == {("-x",)}


def test_all_run_everything(runs: Callable[..., Runs]) -> None:
    seen = runs()
    assert containerd_versions.test_all([], short=False)
    assert [selection for _, selection, _ in seen] == ["integration"] * 3


def test_failure_does_not_keep_the_others_from_running(
    runs: Callable[..., Runs], capsys: pytest.CaptureFixture[str]
) -> None:
    seen = runs(trixie=1)
    assert not containerd_versions.test_all([], short=False)
    assert len(seen) == 3
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "1.7.24" in line]
    assert line.endswith("pytest ended with status 1")


def test_nothing_is_fetched_when_nothing_is_selected(runs: Callable[..., Runs], mirror: list[str]) -> None:
    runs(host=containerd_versions.NOTHING_SELECTED)
    assert containerd_versions.test_all(["tests/unit"], short=True)
    assert mirror == []


@pytest.mark.parametrize(("failures", "failed"), [(0, 1), (3, 4)])
def test_report(tmp_path: Path, failures: int, failed: int) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT.format(failures=failures))
    result = containerd_versions.read_report(OWN, 1, report)
    assert result == Result(OWN, 1, passed=8 - failed, failed=failed, skipped=2, seconds=61.5)
    assert not result.good


def test_run_without_a_report_has_failed(tmp_path: Path) -> None:
    assert not containerd_versions.read_report(OWN, 3, tmp_path / "none.xml").good


def test_pytest_learns_the_folder_and_the_selection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containerd_versions, "RESULTS", tmp_path)
    program = tmp_path / "python"
    program.write_text(
        '#!/bin/sh\necho "$KATA_PY_TEST_CONTAINERD_DIR|$KATA_PY_TEST_RESULTS|$*" > "$0.said"; exit 1\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    results = tmp_path / "containerd-2.1.9"
    for folder, expected in ((Path("/c"), "/c"), (None, "")):
        run = containerd_versions.run_tests(Containerd("2.1.9", "sid", folder), "integration", ["-k", "exec"])
        assert run.status == 1
        wanted = f"-m pytest -m integration --junitxml={results}/report.xml -k exec"
        said = Path(f"{program}.said").read_text()
        assert said == f"{expected}|{results}|{wanted}\n"
