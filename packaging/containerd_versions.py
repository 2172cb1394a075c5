"""Runs the integration tests with each containerd that Debian has, one after the other, and prints a table.

    .venv/bin/python packaging/containerd_versions.py fetch
    .venv/bin/python packaging/containerd_versions.py test [--short] [pytest's arguments...]

The first one is the host's own. The others come as packages from the host's mirror, through an apt state of
their own below build/, and are only unpacked: nothing is installed. 2.x gets the mkfs.erofs of its own release, which
its snapshotter erofs starts. `fetch` prints the folders, for
KATA_PY_TEST_CONTAINERD_DIR. With `--short`, tests marked `one_version` run with the host's own only. Reports,
and what failed tests leave for reading, are in build/test-results/containerd-VERSION.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from guest_image.apt import Apt
from guest_image.errors import ImageError, ToolFailed
from guest_image.tools import host_arch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from guest_image.apt import Package
    from guest_image.tools import Root

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "cache" / "debian"  # one for each suite, which qemu_versions.py uses too
RESULTS = ROOT / "build" / "test-results"
# Debian's suites with the versions of containerd that they will always have; sid's moves.
SUITES = {"bookworm": "1.6", "trixie": "1.7", "sid": ""}
NOTHING_SELECTED = 5  # pytest.ExitCode.NO_TESTS_COLLECTED


class VersionsError(Exception):
    """The tests cannot be run; the text is one line with the reason."""


@dataclass(frozen=True)
class Containerd:
    """One version, in the folder of its `containerd` and `ctr`; None is the host's own, found in PATH."""

    version: str
    source: str
    folder: Path | None = None


@dataclass(frozen=True)
class Result:
    """What came out of one run of pytest; `status` is its exit status."""

    containerd: Containerd
    status: int
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.status in (0, NOTHING_SELECTED) and not self.failed


def say(text: str) -> None:
    """One line of progress, in order with what pytest prints."""
    print(f"containerd versions: {text}", flush=True)


def upstream(version: str) -> str:
    """Upstream's version in Debian's: `2.1.9` in `1:2.1.9+ds1-5`."""
    without_epoch = version.rpartition(":")[2]
    return without_epoch.replace("~", "+").partition("+")[0].partition("-")[0]


def hosts_own() -> Containerd:
    """What the host has installed. Raises VersionsError when there is none."""
    program = shutil.which("containerd")
    if program is None:
        raise VersionsError("containerd is not installed; `make setup` installs it")
    # containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+b1
    words = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()
    return Containerd(upstream(words[2]).removeprefix("v"), "host")


def fetched(suite: str) -> Containerd:
    """The containerd of one of Debian's suites, from the cache if the mirror has no newer one.

    Raises:
        VersionsError: neither the mirror nor the cache has it.
    """
    try:
        apt = Apt(CACHE / suite, arch=host_arch(), suite=suite)
        chosen: list[Package] = []

        def choose() -> list[Package]:
            chosen[:] = apt.alone(["containerd"])
            return chosen

        root = apt.newest("containerd", choose, say)
        programs = root.path / "usr" / "bin"
        if upstream(chosen[0].version).startswith("2."):
            # Its snapshotter erofs needs a younger one than Debian 12 has.
            erofs = apt.newest("erofs", lambda: apt.closure(["erofs-utils"]), say)
            launcher(erofs, erofs.find("usr/bin/mkfs.erofs"), programs / "mkfs.erofs")
    except ImageError as err:
        reason = err.said[0] if isinstance(err, ToolFailed) else err
        raise VersionsError(f"cannot get containerd of Debian {suite}: {reason}") from err
    return Containerd(upstream(chosen[0].version), suite, programs)


def launcher(root: Root, program: Path, path: Path) -> None:
    """A script at `path` that starts a program of another Debian release with the libraries that are its own."""
    libraries = ":".join(str(directory) for directory in root.library_dirs())
    words = shlex.join(str(word) for word in (root.loader(), "--library-path", libraries, program))
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(0o755)


def others(own: Containerd) -> Iterator[Containerd]:
    """Debian's versions that are not the host's. Raises VersionsError."""
    for suite, branch in SUITES.items():
        if branch and own.version.startswith(f"{branch}."):
            continue
        other = fetched(suite)
        if other.version != own.version:
            yield other


def run_tests(containerd: Containerd, selection: str, arguments: Sequence[str]) -> Result:
    """Runs pytest once; an interrupt is passed on to it, so that it can end what it started."""
    results = RESULTS / f"containerd-{containerd.version}"
    report = results / "report.xml"
    report.unlink(missing_ok=True)
    say(f"testing with {containerd.version} ({containerd.source})")
    environment = {
        **os.environ,
        "KATA_PY_TEST_CONTAINERD_DIR": str(containerd.folder or ""),
        "KATA_PY_TEST_RESULTS": str(results),
    }
    command = [sys.executable, "-m", "pytest", "-m", selection, f"--junitxml={report}", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment) as pytest:
        try:
            status = pytest.wait()
        except KeyboardInterrupt:
            pytest.terminate()
            pytest.wait()
            raise
    return read_report(containerd, status, report)


def read_report(containerd: Containerd, status: int, report: Path) -> Result:
    """The numbers of a JUnit report; a run that broke off before it wrote one has none."""
    if not report.exists():
        return Result(containerd, status)
    count = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    seconds = 0.0
    # The file is pytest's own.
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        for name in count:
            count[name] += int(suite.get(name, 0))
        seconds += float(suite.get("time", 0))
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    return Result(containerd, status, passed, failed, count["skipped"], seconds)


def table(results: Sequence[Result]) -> str:
    """One line for each run."""
    lines = [f"{'containerd':<20} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}"]
    for each in results:
        name = f"{each.containerd.version} ({each.containerd.source})"
        numbers = f"{each.passed:>7} {each.failed:>7} {each.skipped:>8} {each.seconds:>8.0f}"
        ending = "" if each.good or each.failed else f"  pytest ended with status {each.status}"
        lines.append(f"{name:<20} {numbers}{ending}")
    return "\n".join(lines)


def test_all(arguments: Sequence[str], *, short: bool) -> bool:
    """Runs the tests with all versions; returns whether all passed. Raises VersionsError."""
    own = hosts_own()
    results = [run_tests(own, "integration", arguments)]
    # Nothing selected by the arguments, with no version: nothing has to be fetched.
    if results[0].status != NOTHING_SELECTED:
        selection = "integration and not one_version" if short else "integration"
        results += [run_tests(other, selection, arguments) for other in list(others(own))]
    print(table(results), flush=True)
    return all(result.good for result in results)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Run the integration tests with every containerd of Debian.", allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("fetch", help="make the programs available, and print where they are")
    test = verbs.add_parser("test", help="run the integration tests with each version", allow_abbrev=False)
    test.add_argument("--short", action="store_true", help="one_version tests with the host's own only")
    options, arguments = parser.parse_known_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        if options.verb == "fetch":
            for containerd in others(hosts_own()):
                print(containerd.version, containerd.folder)
        elif not test_all(arguments, short=options.short):
            sys.exit(1)
    except VersionsError as err:
        sys.exit(f"containerd versions: {err}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
