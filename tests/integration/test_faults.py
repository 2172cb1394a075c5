"""What happens when containerd dies or something was wrong from the beginning; the host is checked after every test."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

    from tests.integration.containerd import Containerd

pytestmark = pytest.mark.usefixtures("restored_configuration")


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
    # 137: the container ended on what it read, and its end killed the writer.
    assert containerd.exec(container, "sh", "-c", "echo the restart > /f").returncode in (0, 137)
    out, _ = reader.communicate(timeout=60)
    assert (reader.returncode, out) == (9, b"after the restart\n")
    containerd.remove(container)


@pytest.mark.one_version
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


@pytest.mark.one_version
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


@pytest.mark.one_version
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
