"""What happens when something dies or was wrong from the beginning; the host is checked after every test."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.integration.containerd import descendants, wait_for_end

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.containerd import Containerd

# The promise is two seconds; the rest is for a machine that is busy with other tests' guests.
EXIT_LIMIT_S = 10.0


def pids_of(container: str, word: str) -> list[int]:
    """Processes of ours that belong to the container and have `word` in their command line."""
    found = descendants(os.getpid()).items()
    return [pid for pid, name in found if word in name and container in name]


@pytest.mark.parametrize("victim", ["qemu-system", "virtiofsd", "containerd-shim-kata-py"])
def test_death_of_a_part_ends_the_task(containerd: Containerd, victim: str) -> None:
    container = containerd.start("sleep", "1000")
    parts = [pid for word in ("qemu-system", "virtiofsd", "shim-kata-py") for pid in pids_of(container, word)]
    waiter = containerd.popen("tasks", "attach", container)
    victims = pids_of(container, victim)
    assert victims
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    out, _ = waiter.communicate(timeout=60)
    assert waiter.returncode != 0, out
    assert time.monotonic() - killed < EXIT_LIMIT_S
    containerd.remove(container)
    wait_for_end(parts, EXIT_LIMIT_S)
    assert [pid for pid in parts if pid in descendants(os.getpid())] == []


def test_helpers_die_with_the_shim_without_any_cleanup(containerd: Containerd) -> None:
    container = containerd.start("sleep", "1000")
    helpers = pids_of(container, "qemu-system") + pids_of(container, "virtiofsd")
    (shim,) = pids_of(container, "shim-kata-py")
    pidfds = [os.pidfd_open(pid) for pid in helpers]
    os.kill(shim, signal.SIGKILL)
    wait_for_end(helpers, EXIT_LIMIT_S)
    assert [pid for pid in helpers if pid in descendants(os.getpid())] == []
    for fd in pidfds:
        os.close(fd)
    containerd.remove(container)


def test_container_survives_containerds_restart(containerd: Containerd) -> None:
    script = "mkfifo /f; read line < /f; echo after $line; exit 9"
    container = containerd.start("sh", "-c", script)
    pid = containerd.server.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    containerd.server.start()
    line = next(x for x in containerd.checked("tasks", "ls").splitlines() if x.startswith(container))
    assert line.split()[2] == "RUNNING"
    reader = containerd.popen("tasks", "attach", container)
    assert containerd.exec(container, "sh", "-c", "echo the restart > /f").returncode == 0
    out, _ = reader.communicate(timeout=60)
    assert (reader.returncode, out) == (9, b"after the restart\n")
    containerd.remove(container)


@pytest.fixture(autouse=True)
def restored_configuration(containerd: Containerd) -> Iterator[None]:
    text = containerd.config.read_text()
    yield
    containerd.config.write_text(text)


@pytest.mark.parametrize(
    ("addition", "words"),
    [
        ('kernel = "/nowhere/vmlinux"', ["kernel", "/nowhere/vmlinux", "does not exist"]),
        ('path = "/nowhere/qemu"', ["path", "/nowhere/qemu"]),
        ('no_such_key = "x"', ["no_such_key"]),
        ('default_vcpus = "two"', ["default_vcpus", "number"]),
    ],
    ids=["missing kernel", "missing QEMU", "unknown key", "wrong type"],
)
def test_wrong_configuration_is_one_clear_line(
    containerd: Containerd, addition: str, words: list[str]
) -> None:
    lines = containerd.config.read_text().splitlines()
    key = addition.split()[0]
    kept = [line for line in lines if line.split()[:1] != [key]]
    text = "\n".join(kept).replace("[hypervisor.qemu]", f"[hypervisor.qemu]\n{addition}")
    containerd.config.write_text(text + "\n")
    started = time.monotonic()
    done = containerd.run("true", options=[], container=(name := containerd.new_id()))
    assert time.monotonic() - started < 30
    containerd.ctr("containers", "rm", name)
    expect_one_line(done, words)


def test_command_that_does_not_exist(containerd: Containerd) -> None:
    done = containerd.run("/no/such/program")
    expect_one_line(done, ["/no/such/program"])


def test_guest_that_never_answers(containerd: Containerd, tmp_path: Path) -> None:
    empty = tmp_path / "empty-initrd"
    empty.write_bytes(b"")
    text = containerd.config.read_text()
    lines = [line for line in text.splitlines() if not line.startswith("initrd")]
    extra = f'[hypervisor.qemu]\ninitrd = "{empty}"\nboot_timeout_s = 3\nkernel_params = "panic=0"'
    containerd.config.write_text("\n".join(lines).replace("[hypervisor.qemu]", extra) + "\n")
    name = containerd.new_id()
    done = containerd.run("true", options=[], container=name)
    containerd.ctr("containers", "rm", name)
    expect_one_line(done, ["agent"])


def test_guest_that_panics_is_quoted(containerd: Containerd, tmp_path: Path) -> None:
    empty = tmp_path / "empty-initrd"
    empty.write_bytes(b"")
    lines = [line for line in containerd.config.read_text().splitlines() if not line.startswith("initrd")]
    extra = f'[hypervisor.qemu]\ninitrd = "{empty}"'
    containerd.config.write_text("\n".join(lines).replace("[hypervisor.qemu]", extra) + "\n")
    name = containerd.new_id()
    done = containerd.run("true", options=[], container=name)
    containerd.ctr("containers", "rm", name)
    expect_one_line(done, ["panic"])


def expect_one_line(done: subprocess.CompletedProcess[str], words: list[str]) -> None:
    assert done.returncode != 0
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]
