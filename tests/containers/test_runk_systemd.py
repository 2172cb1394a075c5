"""`runk --systemd-cgroup` with a real systemd: the host's, or one that is the first process of namespaces of its own.

Such a one has a part of the host's tree of version 2. A host that has version 1 too has hardly a controller there, and
then limits are not looked at.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import host
from tests.support.containers import has_systemd, spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.containers import Containers

_SYSTEMD = Path("/lib/systemd/systemd")
_START_S = 30.0
_TREE = next((path for path in (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
              if (path / "cgroup.procs").exists()), None)  # fmt: skip
pytestmark = pytest.mark.skipif(
    not (_SYSTEMD.exists() and _TREE and shutil.which("nsenter")),
    reason="needs systemd, nsenter and a tree of version 2 of control groups",
)
#: Nothing of the host's own file system is changed: what is mounted is seen by systemd alone.
_BEGIN = f"""
set -e
echo 0 > "$1/cgroup.procs"
exec unshare --cgroup --mount --pid --net --uts --ipc --fork --kill-child --propagation private sh -ec '
    umount -R -l /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /run
    exec env -i container=tests PATH="$PATH" SYSTEMD_UNIT_PATH="$0" {_SYSTEMD} --log-target=null
' "$2"
"""


class Systemd:
    """The host's, on a host where groups are its to give. `group` is the top of its tree."""

    group = Path("/sys/fs/cgroup")

    def __init__(self, folder: Path, program: Path) -> None:
        self._runk = [str(program), "--root", str(folder / "state"), "--systemd-cgroup"]

    def enter(self) -> list[str]:
        """What a command begins with, to be one of its own."""
        return []

    def inside(self, *words: str) -> subprocess.CompletedProcess[str]:
        """What it says goes through a file: a container that it leaves running has its streams."""
        with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
            done = subprocess.run(
                [*self.enter(), *words], check=False, stdin=subprocess.DEVNULL, stdout=said, stderr=complained,
                timeout=60,
            )  # fmt: skip
            said.seek(0)
            complained.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, said.read(), complained.read())

    def runk(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        return self.inside(*self._runk, *map(str, words))

    def shown(self, unit: str, name: str) -> str:
        done = self.inside("systemctl", "show", "--value", "--property", name, unit)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def stop(self) -> None:
        """Nothing."""


class OwnSystemd(Systemd):
    """One in namespaces. `pid` is the host's of the first process in them."""

    def __init__(self, folder: Path, program: Path) -> None:
        super().__init__(folder, program)
        assert _TREE is not None
        self.group = _TREE / f"kata-py-systemd-{secrets.token_hex(4)}"
        self.group.mkdir()
        units = folder / "units"
        units.mkdir()
        (units / "default.target").write_text("[Unit]\nDescription=Nothing at all\n")
        self._outer = subprocess.Popen(
            ["sh", "-c", _BEGIN, "sh", str(self.group), str(units)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.pid = 0

    def wait_until_up(self) -> None:
        """Nothing tells when its socket is there."""
        deadline = time.monotonic() + _START_S
        while not (self.pid and Path(f"/proc/{self.pid}/root/run/systemd/private").exists()):
            assert self._outer.poll() is None, "systemd has ended"
            assert time.monotonic() < deadline, "systemd is not up"
            time.sleep(0.05)
            self.pid = next(iter(host.children(self._outer.pid)), 0)

    def enter(self) -> list[str]:
        return ["nsenter", "--all", f"--target={self.pid}"]

    def stop(self) -> None:
        self._outer.kill()
        self._outer.wait()
        # Its first process takes all others of the namespace along.
        for folder, _, _ in os.walk(self.group, topdown=False):
            _remove(Path(folder))


def _remove(group: Path) -> None:
    """Busy for a moment after the last process has ended."""
    for _ in range(100):
        with suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.02)


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory, program: Path) -> Iterator[Systemd]:
    folder = tmp_path_factory.mktemp("systemd")
    if has_systemd():
        yield Systemd(folder, program)
        return
    made = OwnSystemd(folder, program)
    try:
        made.wait_until_up()
        yield made
    finally:
        made.stop()
    assert not made.group.exists()


def test_life(systemd: Systemd, containers: Containers) -> None:
    document = spec("sleep", "1000")
    container_id, bundle = containers.bundle(document)
    document["linux"]["cgroupsPath"] = f"a-b.slice:test:{container_id}"
    (bundle / "config.json").write_text(json.dumps(document))
    unit = f"test-{container_id}.scope"
    done = systemd.runk("run", "--detach", "--bundle", bundle, container_id)
    assert (done.returncode, done.stderr) == (0, "")
    group = systemd.group / "a.slice/a-b.slice" / unit
    assert systemd.shown(unit, "ControlGroup") == f"/a.slice/a-b.slice/{unit}"
    assert (systemd.shown(unit, "Slice"), systemd.shown(unit, "Delegate")) == ("a-b.slice", "yes")
    assert systemd.shown(unit, "Description") == f"container {container_id}"
    assert len((group / "cgroup.procs").read_text().split()) == 1

    assert systemd.runk("exec", container_id, "cat", "/proc/self/cgroup").stdout.strip().endswith(unit)
    assert json.loads(systemd.runk("state", container_id).stdout)["status"] == "running"
    assert systemd.runk("pause", container_id).returncode == 0
    assert json.loads(systemd.runk("state", container_id).stdout)["status"] == "paused"
    assert systemd.runk("resume", container_id).returncode == 0
    assert systemd.inside("systemctl", "daemon-reload").returncode == 0

    if (group / "pids.max").exists():
        assert systemd.runk("update", "--pids-limit", "77", container_id).returncode == 0
        assert systemd.shown(unit, "TasksMax") == "77"
        assert (group / "pids.max").read_text().strip() == "77"

    again = spec("true")
    other, bundle = containers.bundle(again)
    again["linux"]["cgroupsPath"] = f"a-b.slice:test:{container_id}"
    (bundle / "config.json").write_text(json.dumps(again))
    refused = systemd.runk("run", "--bundle", bundle, other)
    assert refused.returncode == 1
    assert "processes already" in refused.stderr

    assert systemd.runk("delete", "--force", container_id).returncode == 0
    assert not group.exists()
    assert systemd.shown(unit, "LoadState") == "not-found"


def test_a_container_that_ends_by_itself(systemd: Systemd, containers: Containers) -> None:
    document = spec("sh", "-c", "exit 3")
    container_id, bundle = containers.bundle(document)
    del document["linux"]["cgroupsPath"]
    (bundle / "config.json").write_text(json.dumps(document))
    for _ in range(3):  # a scope of before is in nobody's way
        assert systemd.runk("run", "--bundle", bundle, container_id).returncode == 3
    assert systemd.shown(f"runk-{container_id}.scope", "LoadState") == "not-found"


def test_failures_leave_nothing(systemd: Systemd, containers: Containers) -> None:
    document = spec("no-such-program")
    container_id, bundle = containers.bundle(document)
    del document["linux"]["cgroupsPath"]
    (bundle / "config.json").write_text(json.dumps(document))
    assert systemd.runk("run", "--bundle", bundle, container_id).returncode == 127
    assert systemd.shown(f"runk-{container_id}.scope", "LoadState") == "not-found"
    document["linux"]["cgroupsPath"] = "/not/systemd"
    (bundle / "config.json").write_text(json.dumps(document))
    refused = systemd.runk("run", "--bundle", bundle, container_id)
    assert "want slice:prefix:name" in refused.stderr
    assert systemd.runk("list", "-q").stdout == ""
