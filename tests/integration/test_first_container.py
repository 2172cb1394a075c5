"""The first things that anybody tries: a container runs in a kernel of its own, and its output and status arrive."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from tests.integration.containerd import GUEST

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd


def test_container_runs_in_the_guest_kernel(containerd: Containerd) -> None:
    done = containerd.run("uname", "-r")
    kernel = json.loads((GUEST / "manifest.json").read_text())["kernel_release"]
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{kernel}\n", "")


def test_output_input_and_status_arrive(containerd: Containerd) -> None:
    done = containerd.run("sh", "-c", "head -n1; echo problem >&2; exit 7", input="hello\n")
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello\n", "problem\n")


def test_exec_in_a_running_container(containerd: Containerd) -> None:
    container = containerd.start("sleep", "1000")
    try:
        done = containerd.exec(container, "cat", input="there\n")
        assert (done.returncode, done.stdout, done.stderr) == (0, "there\n", "")
        assert containerd.exec(container, "sh", "-c", "exit 9").returncode == 9
    finally:
        containerd.remove(container)


def test_owners_and_modes_of_the_images_files(containerd: Containerd) -> None:
    done = containerd.run("sh", "-c", "stat -c %U /home/user; stat -c %a /tmp")
    assert done.stdout == "user\n1777\n"
