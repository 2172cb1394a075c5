"""Debian's Podman with `runk` as its runtime: what people do with it, in a store of the test's own."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image
import pytest

from tests.support import host
from tests.support.containers import MANAGERS, groups_below, in_terminal, written

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(shutil.which("podman") is None, reason="there is no podman; packaging/setup.sh tests"),
    pytest.mark.timeout(300),
]
ROOT = Path(__file__).resolve().parents[2]
ARCHIVE = ROOT / "build" / "busybox.tar"
#: Those that it has for root when none are given are above what every host allows.
_LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
_TREES = Path("/sys/fs/cgroup")


class Podman:
    """Its commands. All that it keeps is in one folder, all groups are below one of the test's name."""

    def __init__(self, folder: Path, runtime: Path, manager: str) -> None:
        # A slice, if it is systemd's, in whose names dashes lead to other slices.
        name = f"kpypodman{secrets.token_hex(4)}"
        self._parent, self.name = (f"{name}.slice",) * 2 if manager == "systemd" else (f"/{name}", name)
        self._folder = folder
        self._runk = [str(runtime), "--root", str(folder / "runk")]
        # A program of its own, because Podman gives what --runtime-flag says to all verbs but delete.
        wrapper = folder / "runk-here"
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.join(self._runk)} "$@"\n')
        wrapper.chmod(0o755)
        self._words = [
            "podman", "--root", str(folder / "root"), "--runroot", str(folder / "run"), "--tmpdir", str(folder / "tmp"),
            "--storage-driver", "vfs", "--cgroup-manager", manager, "--events-backend", "file",
            "--runtime", str(wrapper),
        ]  # fmt: skip
        # The host's own settings, if it has any, are about other containers.
        settings = folder / "containers.conf"
        settings.write_text('[engine]\nhealthcheck_events = false\n[network]\ndefault_network = "none"\n')
        self.environment = {**os.environ, "CONTAINERS_CONF": str(settings), "TMPDIR": str(folder)}

    def command(self, *words: str) -> list[str]:
        return [*self._words, *words]

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
            env=self.environment, timeout=120,
        )  # fmt: skip

    def ok(self, *words: str) -> str:
        """Its output. What it says on its standard error when it fails is the test's failure."""
        done = self.call(*words)
        assert done.returncode == 0, f"podman {' '.join(words)}: {done.stderr}"
        return done.stdout.strip()

    def run(self, *options: str) -> list[str]:
        """The beginning of a `podman run`."""
        return ["run", *_LIMITS, "--network", "none", "--cgroup-parent", self._parent, *options]

    def sleeping(self, *options: str) -> str:
        return self.ok(*self.run("--detach", *options), busybox_image.NAME, "sleep", "1000")

    def known_to_runk(self) -> list[str]:
        done = subprocess.run([*self._runk, "list", "-q"], capture_output=True, text=True, check=True)
        return done.stdout.split()

    def groups(self) -> list[Path]:
        return groups_below(self.name)

    def clear(self) -> None:
        self.call("rm", "--all", "--force", "--time", "0")
        self.call("system", "reset", "--force")
        # Its own groups for conmon it leaves to whoever gave it the parent.
        for path in (
            *reversed(self.groups()),
            *_TREES.glob("*/libpod_parent/conmon"),
            *_TREES.glob("*/libpod_parent"),
        ):
            with suppress(OSError):
                path.rmdir()


@pytest.fixture(scope="module", params=MANAGERS)
def podman(
    tmp_path_factory: pytest.TempPathFactory, program: Path, request: pytest.FixtureRequest
) -> Iterator[Podman]:
    if not ARCHIVE.exists():
        pytest.skip(f"{ARCHIVE.relative_to(ROOT)} is not there; make image")
    folder = tmp_path_factory.mktemp("podman")
    processes = host.descendants(os.getpid())
    made = Podman(folder, program, request.param)
    made.ok("load", "--input", str(ARCHIVE))
    yield made
    made.clear()
    host.reap()
    left = [words for pid, words in host.descendants(os.getpid()).items() if pid not in processes]
    assert left == []
    assert made.known_to_runk() == []
    assert made.groups() == []
    assert host.mounts_below(folder) == []


def test_run(podman: Podman) -> None:
    done = podman.call(*podman.run("--rm"), busybox_image.NAME, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    done = podman.call(*podman.run("--rm"), busybox_image.NAME, "no-such-program")
    assert done.returncode == 127
    assert "executable file not found" in done.stderr
    assert podman.ok(*podman.run("--rm", "--user", "1000", "--env", "A=b"), busybox_image.NAME,
                     "sh", "-c", "echo $(id -u) $A") == "1000 b"  # fmt: skip
    assert podman.known_to_runk() == []


def test_limits(podman: Podman) -> None:
    limits = ("--memory", "64m", "--pids-limit", "33", "--cpus", "0.5", "--cpu-shares", "512")
    container = podman.sleeping(*limits)
    told = json.loads(podman.ok("stats", "--no-stream", "--format", "json", container))
    assert told[0]["id"] == container[:12]
    assert int(told[0]["pids"]) == 1
    groups = [path for path in podman.groups() if container in path.name and "conmon" not in path.name]
    assert written(groups, "memory.limit_in_bytes", "memory.max") == {str(64 << 20)}
    assert written(groups, "pids.max") == {"33"}
    assert written(groups, "cpu.shares", "cpu.weight") <= {"512", "20"}
    podman.ok("rm", "--force", "--time", "0", container)


def test_life(podman: Podman) -> None:
    container = podman.sleeping("--health-cmd", "test -e /tmp/well", "--health-interval", "disable")
    assert container in podman.known_to_runk()
    assert podman.ok("exec", container, "sh", "-c", "touch /tmp/well; echo more") == "more"
    assert podman.call("exec", container, "sh", "-c", "exit 5").returncode == 5
    assert podman.call("exec", "--detach", container, "touch", "/tmp/detached").returncode == 0
    assert podman.call("healthcheck", "run", container).returncode == 0
    assert podman.call("exec", container, "rm", "/tmp/well").returncode == 0
    assert podman.call("healthcheck", "run", container).returncode == 1
    assert "sleep 1000" in podman.ok("top", container, "args")

    podman.ok("pause", container)
    assert podman.ok("inspect", "--format", "{{.State.Status}}", container) == "paused"
    assert podman.call("exec", container, "true").returncode != 0
    podman.ok("unpause", container)
    assert podman.ok("exec", container, "echo", "awake") == "awake"

    podman.ok("stop", "--time", "0", container)
    assert (
        podman.ok("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", container) == "exited 137"
    )
    podman.ok("start", container)
    podman.ok("kill", "--signal", "KILL", container)
    assert podman.ok("wait", container) == "137"
    podman.ok("rm", container)
    assert podman.known_to_runk() == []


def test_logs(podman: Podman) -> None:
    container = podman.ok(
        *podman.run("--detach"), busybox_image.NAME, "sh", "-c", "echo one; echo two >&2; exit 4"
    )
    assert podman.ok("wait", container) == "4"
    done = podman.call("logs", container)
    assert (done.stdout, done.stderr) == ("one\n", "two\n")
    podman.ok("rm", container)


def test_terminal(podman: Podman) -> None:
    container = podman.sleeping()
    script = "tty; read line; echo got $line; exit 6"
    status, said = in_terminal(
        podman.command("exec", "-it", container, "sh", "-c", script),
        b"hello\n",
        podman.environment,
        asked=b"/dev/pts/",
    )
    assert (status, "/dev/pts/" in said, "got hello" in said) == (6, True, True)
    status, said = in_terminal(
        podman.command(*podman.run("--rm", "-it"), busybox_image.NAME, "sh", "-c", script),
        b"again\n",
        podman.environment,
        asked=b"/dev/pts/",
    )
    assert (status, "got again" in said) == (6, True)
    podman.ok("rm", "--force", "--time", "0", container)
