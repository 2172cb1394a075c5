"""packaging/setup.sh with programs of the distribution replaced by ones that only take notes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[3] / "packaging" / "setup.sh"
NOTING = '#!/bin/sh\necho "$(basename "$0") $*" >> "$NOTES"\n'


class FakeSystem:
    """A PATH with stand-ins, an os-release, and notes of the calls that would have changed something."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bin = folder / "bin"
        self._bin.mkdir()
        self.notes = folder / "notes"
        self.notes.touch()
        self._program("apt-get", NOTING + '[ "$1" != update ] || exit "${UPDATE_STATUS:-0}"\n')
        self.user(0)
        self.release("debian", "12")
        self.installed()

    def _program(self, name: str, text: str) -> None:
        path = self._bin / name
        path.write_text(text)
        path.chmod(0o755)

    def user(self, uid: int) -> None:
        self._program("id", f"#!/bin/sh\necho {uid}\n")

    def release(self, distribution: str, version: str) -> None:
        text = f'ID={distribution}\nVERSION_ID="{version}"\n' if version else f"ID={distribution}\n"
        (self._folder / "os-release").write_text(text)

    def installed(self, *, except_for: str = "") -> None:
        self._program(
            "dpkg-query",
            f'#!/bin/sh\nfor last; do :; done\n[ "$last" != "{except_for}" ] || exit 1\nprintf installed\n',
        )

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", SETUP, *arguments],
            env={
                "PATH": f"{self._bin}:/usr/bin:/bin",
                "NOTES": str(self.notes),
                "KATA_PY_OS_RELEASE": str(self._folder / "os-release"),
                "KATA_PY_POLICY": str(self._folder / "policy-rc.d"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def test_complete_system_is_left_alone(system: FakeSystem) -> None:
    done = system.run()
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert system.notes.read_text() == ""


def test_one_call_installs_what_is_missing(system: FakeSystem, tmp_path: Path) -> None:
    system.installed(except_for="containerd")
    assert system.run().returncode == 0
    update, install = system.notes.read_text().splitlines()
    assert update == "apt-get update -q"
    assert install == "apt-get install -q -y --no-install-recommends containerd"
    assert not (tmp_path / "policy-rc.d").exists()


def test_failing_update_is_survived(system: FakeSystem) -> None:
    system.installed(except_for="busybox-static")
    done = system.run(UPDATE_STATUS="100")
    assert done.returncode == 0
    assert "package lists at hand" in done.stderr
    assert system.notes.read_text().splitlines()[-1].endswith(" busybox-static")


def test_existing_policy_is_kept(system: FakeSystem, tmp_path: Path) -> None:
    (tmp_path / "policy-rc.d").write_text("theirs")
    system.installed(except_for="busybox-static")
    system.run()
    assert (tmp_path / "policy-rc.d").read_text() == "theirs"


def test_others_than_root_are_told_the_command(system: FakeSystem) -> None:
    system.user(1000)
    system.installed(except_for="python3-venv")
    done = system.run()
    assert done.returncode == 1
    assert "apt-get install --no-install-recommends python3-venv" in done.stderr
    assert system.notes.read_text() == ""


@pytest.mark.parametrize(("version", "separate"), [("12", False), ("13", True), ("", True)])
def test_virtiofsd_is_a_package_since_debian_13(system: FakeSystem, version: str, separate: bool) -> None:
    system.release("debian", version)
    listed = system.run("--list").stdout.split()
    assert ("virtiofsd" in listed) == separate
    assert {"qemu-system-x86", "containerd", "python3-venv"} <= set(listed)


def test_what_measuring_needs_is_for_who_asks(system: FakeSystem) -> None:
    assert set(system.run("--list", "bench").stdout.split()) - set(system.run("--list").stdout.split()) == {
        "gcc",
        "libc6-dev",
        "iperf3",
        "runc",
        "crun",
        "time",
        "mount",
    }


@pytest.mark.parametrize(
    ("version", "s390x"), [("12", "qemu-system-misc"), ("13", "qemu-system-s390x"), ("", "qemu-system-s390x")]
)
def test_what_only_tests_need_is_for_who_asks(system: FakeSystem, version: str, s390x: str) -> None:
    system.release("debian", version)
    more = set(system.run("--list", "tests").stdout.split()) - set(system.run("--list").stdout.split())
    # Debian 12 has the storage daemon in a package that QEMU comes with, and an mkfs.erofs that is too old.
    assert more == (
        {
            "qemu-system-arm",
            s390x,
            "xfsprogs",
            "mount",
            "cpio",
            "systemd",
            "dbus",
            "dmsetup",
            "docker.io",
            "podman",
        }
        | ({"qemu-utils", "erofs-utils", "docker-cli"} if version != "12" else set())
    )


def test_unknown_words_change_nothing(system: FakeSystem) -> None:
    system.installed(except_for="containerd")
    assert system.run("--help").returncode == 2
    assert system.notes.read_text() == ""


def test_other_distributions_are_not_touched(system: FakeSystem) -> None:
    system.release("fedora", "40")
    system.installed(except_for="containerd")
    done = system.run()
    assert done.returncode == 0
    assert "not Debian" in done.stderr
    assert system.notes.read_text() == ""
