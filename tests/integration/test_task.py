"""`ctr run -d` and the verbs of `ctr task` on a container that runs."""

from __future__ import annotations

import subprocess
import threading
from typing import TYPE_CHECKING

import pytest

from tests.integration.containerd import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd


@pytest.fixture
def container(containerd: Containerd) -> Iterator[str]:
    """A container that sleeps, removed after the test."""
    name = containerd.start(
        "sh", "-c", "trap 'exit 3' TERM; touch /ready; while :; do sleep 1000 & wait; done"
    )
    yield name
    containerd.remove(name)


def status(containerd: Containerd, container: str) -> str:
    lines = [line.split() for line in containerd.checked("tasks", "ls").splitlines()]
    return next((words[2] for words in lines if words[0] == container), "absent")


def test_ls_shows_it_running_with_a_pid(containerd: Containerd, container: str) -> None:
    line = next(x for x in containerd.checked("tasks", "ls").splitlines() if x.startswith(container))
    assert line.split()[2] == "RUNNING"
    assert int(line.split()[1]) > 0


def test_ps(containerd: Containerd, container: str) -> None:
    """The processes in the guest, by the guest's numbers; the task's own process is the machine's."""
    listed = containerd.checked("tasks", "ls").splitlines()
    machine = next(int(line.split()[1]) for line in listed if line.startswith(container))
    lines = containerd.checked("tasks", "ps", container).splitlines()
    assert lines[0].split()[0] == "PID"
    pids = [int(line.split()[0]) for line in lines[1:]]
    assert pids
    assert machine not in pids
    assert min(pids) > 1  # the guest's own first process is the agent


def test_metrics_are_the_guests(containerd: Containerd, container: str) -> None:
    table = containerd.checked("tasks", "metrics", container)
    values = dict(line.split()[:2] for line in table.splitlines() if len(line.split()) >= 2)
    assert (
        int(values["memory.usage_in_bytes"] if "memory.usage_in_bytes" in values else values["memory.usage"])
        > 0
    )


def test_exec_has_its_own_streams_status_and_stdin(containerd: Containerd, container: str) -> None:
    done = containerd.exec(container, "sh", "-c", "cat; echo e >&2; exit 5", input="through\n")
    assert (done.returncode, done.stdout, done.stderr) == (5, "through\n", "e\n")


def test_exec_options_reach_the_process(containerd: Containerd, container: str) -> None:
    options = ["--user", "1000:1000", "--cwd", "/tmp"]
    done = containerd.exec(container, "sh", "-c", "id -u; pwd", options=options)
    assert done.stdout.split() == ["1000", "/tmp"]


def test_five_execs_at_once(containerd: Containerd, container: str) -> None:
    results: dict[int, tuple[int, str]] = {}

    def run(number: int) -> None:
        done = containerd.exec(container, "sh", "-c", f"echo {number}; exit {number}", timeout_s=120)
        results[number] = (done.returncode, done.stdout)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: (number, f"{number}\n") for number in range(1, 6)}


def test_exec_of_a_missing_program_fails_in_one_line(containerd: Containerd, container: str) -> None:
    done = containerd.exec(container, "no-such-program")
    assert done.returncode != 0
    assert "no-such-program" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert status(containerd, container) == "RUNNING"


def test_pause_and_resume(containerd: Containerd, container: str) -> None:
    containerd.checked("tasks", "pause", container)
    assert status(containerd, container) == "PAUSED"
    containerd.checked("tasks", "resume", container)
    assert status(containerd, container) == "RUNNING"
    assert containerd.exec(container, "true").returncode == 0


def test_signal_reaches_the_init_process(containerd: Containerd, container: str) -> None:
    # A SIGTERM that comes before the shell has set its trap would find an init that heeds none.
    assert containerd.exec(container, "sh", "-c", "until [ -e /ready ]; do :; done").returncode == 0
    waiter = containerd.popen("tasks", "attach", container)
    containerd.checked("tasks", "kill", "--signal", "SIGTERM", container)
    waiter.communicate(timeout=60)
    assert waiter.returncode == 3


def test_kill_ends_it_with_137(containerd: Containerd, container: str) -> None:
    waiter = containerd.popen("tasks", "attach", container)
    containerd.checked("tasks", "kill", "--signal", "SIGKILL", container)
    waiter.communicate(timeout=60)
    assert waiter.returncode == 137


def test_removing_the_task_ends_the_machine(containerd: Containerd) -> None:
    name = containerd.start("sleep", "1000")
    containerd.checked("tasks", "kill", "--signal", "SIGKILL", name)
    containerd.ctr("tasks", "wait", name)
    containerd.checked("tasks", "rm", "--force", name)
    assert status(containerd, name) == "absent"
    containerd.checked("containers", "rm", name)


@pytest.mark.one_version
def test_the_configuration_of_a_running_sandbox_can_be_shown(containerd: Containerd, container: str) -> None:
    """Every value, and what set it."""
    command = [str(REPOSITORY / "build/bin/kata-py"), "config", "show", "--sandbox", container]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    shown = dict(line.split(" = ", 1) for line in done.stdout.splitlines() if " = " in line)
    assert str(containerd.config) in shown["hypervisor.qemu.kernel"]
    assert "default" in shown["hypervisor.qemu.enable_numa"]
