"""The host's side of a sandbox in its control groups, with and without `sandbox_cgroup_only`; nothing of it is left."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.cri.kubelet import eventually
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


def group(name: str, path: str) -> Path:
    """The folder of a control group, of version 1 in this hierarchy."""
    root = Path("/sys/fs/cgroup")
    return (root if unified() else root / name) / path.lstrip("/")


def numbers(file: Path) -> set[int]:
    return {int(word) for word in file.read_text().split()}


def cpu_ns(folder: Path) -> int:
    """What a group and those below it have used of the processors."""
    if unified():
        return 1000 * int((folder / "cpu.stat").read_text().split()[1])
    return int((folder / "cpuacct.usage").read_text())


@pytest.mark.parametrize("crashes", [False, True])
def test_processors_are_in_the_pods_group_and_the_rest_is_overhead(
    containerd: Containerd, crashes: bool
) -> None:
    container = containerd.start("sh", "-c", "while :; do :; done")
    pod, overhead = f"/{containerd.namespace}/{container}", f"/kata_overhead/{container}"
    try:
        running = parts(container)
        rest = {pid for name, pid in running.items() if name != "qemu" or not unified()}
        assert numbers(group("memory", overhead) / "cgroup.procs") == rest
        if unified():
            assert numbers(group("", pod) / "cgroup.procs") == {running["qemu"]}
        else:
            threads = {int(name) for name in os.listdir(f"/proc/{running['qemu']}/task")}
            for name in ("cpu", "cpuacct", "cpuset"):
                processors = numbers(group(name, pod) / "tasks")
                assert processors
                assert processors < threads
                assert numbers(group(name, overhead) / "tasks") >= threads - processors
            assert not group("memory", pod).exists()
        used = cpu_ns(group("cpuacct", pod))
        eventually(
            lambda: cpu_ns(group("cpuacct", pod)) > used + 100_000_000, "what the container uses is counted"
        )
        if crashes:
            os.kill(running["shim"], signal.SIGKILL)
    finally:
        # The fixture compares the host's control groups with those before.
        containerd.remove(container)
    # After a crash containerd does not wait for `delete`. Others may have their groups there.
    eventually(lambda: not group("memory", overhead).exists(), "the group for overhead is gone")


def test_a_containers_own_limits_hold_for_the_processors(containerd: Containerd) -> None:
    """Nobody else sets them where there is no pod. In the guest there is the container's own group, as always."""
    container = containerd.start("sleep", "1000", options=["--cpus", "0.5"])
    pod = f"/{containerd.namespace}/{container}"
    try:
        if unified():
            assert (group("", pod) / "cpu.max").read_text() == "50000 100000\n"
        else:
            words = [(group("cpu", pod) / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
            assert words == ["50000\n", "100000\n"]
    finally:
        containerd.remove(container)
