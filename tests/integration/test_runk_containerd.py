"""`runk` in the place of runc: containerd's own shim calls it, for containers on the host."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.integration import containerd as support
from tests.integration.terminal import Terminal

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from tests.integration.containerd import Containerd

RUNK = support.REPOSITORY / "build" / "bin" / "runk"


@pytest.fixture
def runk(containerd: Containerd) -> Containerd:
    """The same containerd, asked for containers by runc's shim."""
    return replace(containerd, runtime="io.containerd.runc.v2", run_options=("--runc-binary", str(RUNK)))


def test_run_with_output_input_and_status(runk: Containerd) -> None:
    done = runk.run("sh", "-c", "echo out; echo err >&2; read line; echo got $line; exit 3", input="in\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\ngot in\n", "err\n")


def test_program_that_is_not_there(runk: Containerd) -> None:
    done = runk.run("no-such-program", options=())
    assert done.returncode != 0
    assert "executable file not found in $PATH" in done.stderr
    runk.checked("containers", "rm", runk.ids[-1])


def test_seccomp_limits_and_devices_of_containerd(runk: Containerd) -> None:
    container = runk.start("sleep", "1000", options=("--seccomp", "--memory-limit", "67108864"))
    try:
        group = support.CGROUPS / "memory" / runk.namespace / container
        assert (group / "memory.limit_in_bytes").read_text() == "67108864\n"
        script = (
            "grep Seccomp: /proc/1/status; dd if=/dev/zero of=/dev/null count=1 2>&1; head -c 1 /dev/kmsg"
        )
        said = runk.exec(container, "sh", "-c", f"mknod /dev/kmsg c 1 11; {script}")
        assert "Seccomp:\t2" in said.stdout
        assert "1+0 records in" in said.stdout
        assert "Operation not permitted" in said.stderr
    finally:
        runk.remove(container)


def test_terminal_with_resize(runk: Containerd) -> None:
    arguments = runk.run_arguments(runk.new_id(), ["sh"], options=["--rm", "--tty"])
    argv = runk.server.ctr_argv(*arguments, namespace=runk.namespace)
    with Terminal(argv, rows=31, columns=97) as terminal:
        terminal.read_until("[#$] ")
        terminal.type("until [ \"$(stty size)\" = '31 97' ]; do :; done; tty; echo si''zed\n")
        assert "/dev/pts/" in terminal.read_until("sized\r+\n")
        # ctr passes sizes on only after it has set the first one: a change in between is lost on it.
        seen, columns = "", 120
        while f"40 {columns}" not in seen:
            columns += 1
            terminal.resize(40, columns)
            terminal.type("stty size; echo do''ne\n")
            seen = terminal.read_until("done\r+\n")
        terminal.type("exit 4\n")
        assert terminal.process.wait(timeout=60) == 4


@contextmanager
def in_the_foreground(runk: Containerd, script: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A container that has said "ready", and the `ctr run` that ends with its status."""
    container = runk.new_id()
    with runk.popen(*runk.run_arguments(container, ["sh", "-c", script], options=["--rm"])) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield container, process
        finally:
            process.kill()


def test_life_of_a_task(runk: Containerd) -> None:
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.2; done"
    with in_the_foreground(runk, script) as (container, process):
        assert runk.exec(container, "sh", "-c", "cat; exit 5", input="through\n").stdout == "through\n"
        assert runk.exec(container, "sh", "-c", "exit 5").returncode == 5
        missing = runk.exec(container, "no-such-program")
        assert "executable file not found in $PATH" in missing.stderr
        runk.checked("tasks", "pause", container)
        assert "PAUSED" in runk.checked("tasks", "ls")
        runk.checked("tasks", "resume", container)
        assert "RUNNING" in runk.checked("tasks", "ls")
        assert "memory.usage_in_bytes" in runk.checked("tasks", "metrics", container)
        assert len(runk.checked("tasks", "ps", container).splitlines()) >= 2
        runk.checked("tasks", "kill", "--signal", "SIGTERM", container)
        assert process.wait(timeout=60) == 7


def test_killed_with_all_its_processes(runk: Containerd) -> None:
    with in_the_foreground(runk, "sleep 1000 & sleep 1001 & echo ready; wait") as (container, process):
        runk.checked("tasks", "kill", "--all", "--signal", "SIGKILL", container)
        assert process.wait(timeout=60) == 137
