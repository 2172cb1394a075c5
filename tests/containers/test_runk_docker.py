"""Debian's dockerd with `runk` as one of its runtimes, in folders of the test's own and without a network."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.containers import MANAGERS, written
from tests.support.docker import IMAGE, Docker

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.skipif(
        shutil.which("dockerd") is None, reason="there is no dockerd; packaging/setup.sh tests"
    ),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module", params=MANAGERS)
def docker(
    tmp_path_factory: pytest.TempPathFactory, program: Path, request: pytest.FixtureRequest
) -> Iterator[Docker]:
    options = ("--add-runtime", f"runk={program}", "--default-runtime", "runk")
    made = Docker(tmp_path_factory.mktemp("docker"), options, manager=request.param)
    try:
        made.wait_until_up()
        made.import_image()
        yield made
        assert known_to_runk(made, program) == []
    finally:
        left = made.stop()
    assert left == []


def known_to_runk(docker: Docker, program: Path) -> list[str]:
    """The ids in the states of all namespaces that the daemon has."""
    found = []
    for root in docker.folder.glob("exec/runtime-*/*"):
        done = subprocess.run([program, "--root", root, "list", "-q"], capture_output=True, check=True)
        found += done.stdout.decode().split()
    return found


def test_run(docker: Docker) -> None:
    done = docker.call(
        "run", "--rm", "--network", "none", IMAGE, "sh", "-c", "echo out; echo err >&2; exit 3"
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    done = docker.call("run", "--rm", "--network", "none", "--interactive", IMAGE, "cat", data=b"in\n")
    assert (done.returncode, done.stdout) == (0, b"in\n")
    done = docker.call("run", "--rm", "--network", "none", "--tty", IMAGE, "tty")
    assert done.stdout.startswith(b"/dev/pts/")
    done = docker.call("run", "--rm", "--network", "none", IMAGE, "no-such-program")
    assert (done.returncode, b"executable file not found in $PATH" in done.stderr) == (127, True)


def test_life(docker: Docker, program: Path) -> None:
    container = docker.ok(
        "run", "--detach", "--network", "none", "--health-cmd", "true", "--health-interval", "1s", "--init", IMAGE,
        "sleep", "1000",
    )  # fmt: skip
    assert container in known_to_runk(docker, program)
    assert docker.ok("exec", container, "echo", "more") == "more"
    assert docker.call("exec", container, "sh", "-c", "exit 5").returncode == 5
    assert docker.call("exec", "--tty", container, "tty").stdout.startswith(b"/dev/pts/")
    assert "sleep 1000" in docker.ok("top", container)
    assert "healthy" in docker.first_event(container, "health_status")
    docker.ok("pause", container)
    assert docker.ok("inspect", "--format", "{{.State.Status}}", container) == "paused"
    docker.ok("unpause", container)
    stats = json.loads(docker.ok("stats", "--no-stream", "--format", "{{json .}}", container))
    assert stats["PIDs"] == "2"
    docker.ok("stop", "--time", "1", container)
    docker.ok("start", container)
    docker.ok("kill", container)
    assert docker.ok("wait", container) == "137"
    docker.ok("rm", container)
    assert known_to_runk(docker, program) == []


def test_limits(docker: Docker) -> None:
    limits = ("--memory", "64m", "--pids-limit", "33", "--cpus", "0.5", "--cpu-shares", "512")
    container = docker.ok("run", "--detach", "--network", "none", *limits, IMAGE, "sleep", "1000")
    groups = [path for path in docker.groups() if container in path.name]
    assert written(groups, "memory.limit_in_bytes", "memory.max") == {str(64 << 20)}
    assert written(groups, "pids.max") == {"33"}
    docker.ok("update", "--pids-limit", "44", container)
    assert written(groups, "pids.max") == {"44"}
    docker.ok("rm", "--force", container)


def test_logs(docker: Docker) -> None:
    container = docker.ok(
        "run", "--detach", "--network", "none", IMAGE, "sh", "-c", "echo one; echo two >&2; exit 4"
    )
    assert docker.ok("wait", container) == "4"
    done = docker.call("logs", container)
    assert (done.stdout, done.stderr) == (b"one\n", b"two\n")
    docker.ok("rm", container)
