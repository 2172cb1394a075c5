"""`sandbox_cgroup_only`: the host's side of a sandbox in the pod's control group, and nothing left of that."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.faults import parts

if TYPE_CHECKING:
    from tests.integration.containerd import Containerd

pytestmark = [pytest.mark.one_version, pytest.mark.usefixtures("restored_configuration")]


def groups_of(pid: int) -> set[str]:
    """Paths of the control groups that the process is in, of those hierarchies that limit or count something."""
    found = set()
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, names, path = line.split(":", 2)
        if {"cpu", "memory", "pids", "cpuset"} & set(names.split(",")) or (number == "0" and unified()):
            found.add(path)
    return found


def unified() -> bool:
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


@pytest.mark.parametrize("crashes", [False, True])
def test_all_of_it_is_in_the_pods_group(containerd: Containerd, crashes: bool) -> None:
    text = containerd.config.read_text()
    containerd.config.write_text(f"{text}\n[runtime]\nsandbox_cgroup_only = true\n")
    container = containerd.start("sleep", "1000")
    try:
        running = parts(container)
        assert {"shim", "qemu"} <= set(running)
        for name, pid in running.items():
            assert groups_of(pid) == {f"/{containerd.namespace}/{container}"}, name
        if crashes:
            os.kill(running["shim"], signal.SIGKILL)
    finally:
        # The fixture compares the host's control groups with those before.
        containerd.remove(container)
