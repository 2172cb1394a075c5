"""kata-py's files are replaced or removed under running containers, and containerd is restarted."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.integration.containerd import wait_for_end
from tests.support.host import descendants
from tests.support.installation import Installation

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.integration.containerd import Containerd

NEWER = "99.0"
EXIT_LIMIT_S = 20.0


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path / "lib", tmp_path / "bin" / "containerd-shim-kata-py-v2")


@pytest.fixture
def installed(containerd: Containerd, installation: Installation) -> Containerd:
    """The tests' containerd with the runtime of the installation."""
    return replace(containerd, runtime=str(installation.program))


def newer(installation: Installation) -> None:
    installation.replace(NEWER)
    said = subprocess.run([installation.program, "-v"], capture_output=True, text=True, check=True).stdout
    assert NEWER in said


CHANGES = pytest.mark.parametrize("change", [newer, Installation.remove], ids=["replaced", "removed"])


def restart(containerd: Containerd) -> None:
    pid = containerd.server.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    containerd.server.start()


def status(containerd: Containerd, container: str) -> str:
    lines = [line.split() for line in containerd.checked("tasks", "ls").splitlines()]
    return next((words[2] for words in lines if words[0] == container), "absent")


def shim_of(container: str) -> int:
    found = descendants(os.getpid()).items()
    (pid,) = [pid for pid, name in found if "containerd-shim-kata-py" in name and container in name]
    return pid


def expect_alive(containerd: Containerd, container: str) -> None:
    """Whatever can be asked of a running container works."""
    assert status(containerd, container) == "RUNNING"
    done = containerd.exec(container, "sh", "-c", "cat; echo e >&2; exit 5", input="through\n")
    assert (done.returncode, done.stdout, done.stderr) == (5, "through\n", "e\n")
    assert containerd.exec(container, "no-such-program").returncode != 0
    assert containerd.checked("tasks", "ps", container).splitlines()[1:]
    assert "memory" in containerd.checked("tasks", "metrics", container)
    containerd.checked("tasks", "pause", container)
    assert status(containerd, container) == "PAUSED"
    containerd.checked("tasks", "resume", container)


@CHANGES
def test_container_goes_on_after_containerds_restart(
    installed: Containerd, installation: Installation, change: Callable[[Installation], None]
) -> None:
    script = "mkfifo /f /g; read line < /f; echo $line; read line < /g; echo after $line; exit 9"
    container = installed.start("sh", "-c", script)
    # Not at once: the ctr that starts the container reads what comes while it is still there.
    assert installed.exec(container, "sh", "-c", "echo before > /f").returncode == 0
    change(installation)
    restart(installed)
    expect_alive(installed, container)
    reader = installed.popen("tasks", "attach", container)
    # Its status says nothing: the container ends at once, and every exec with it.
    installed.exec(container, "sh", "-c", "echo the change > /g")
    out, _ = reader.communicate(timeout=60)
    assert (reader.returncode, out) == (9, b"before\nafter the change\n")
    assert status(installed, container) == "absent", "attach deletes the task in the end"
    installed.checked("containers", "rm", container)


def test_container_goes_on_without_a_restart(installed: Containerd, installation: Installation) -> None:
    container = installed.start("sleep", "1000")
    installation.remove()
    expect_alive(installed, container)
    waiter = installed.popen("tasks", "attach", container)
    installed.checked("tasks", "kill", "--signal", "SIGKILL", container)
    waiter.communicate(timeout=60)
    assert waiter.returncode == 128 + signal.SIGKILL
    # containerd cannot run the program's `delete` any more; there is nothing left for it to do.
    assert status(installed, container) == "absent"
    installed.checked("containers", "rm", container)


def test_two_upgrades_with_a_restart_after_each(installed: Containerd, installation: Installation) -> None:
    container = installed.start("sleep", "1000")
    for version in ("98.0", "99.0"):
        installation.replace(version)
        restart(installed)
        assert status(installed, container) == "RUNNING"
    assert installed.run("true").returncode == 0, "a container of the new version beside one of the old"
    installed.remove(container)


def test_crash_after_an_upgrade_is_cleaned_up(installed: Containerd, installation: Installation) -> None:
    container = installed.start("sleep", "1000")
    newer(installation)
    restart(installed)
    shim = shim_of(container)
    waiter = installed.popen("tasks", "attach", container)
    os.kill(shim, signal.SIGKILL)
    wait_for_end([shim], EXIT_LIMIT_S)
    waiter.communicate(timeout=60)
    assert waiter.returncode != 0
    installed.remove(container)
