"""Limits of containers: seen in their cgroups, changed while they run, and kept apart from each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.cri.client import Cri
    from tests.integration.cri.kubelet import Kubelet, Pod

MIB = 1 << 20
# Takes memory without end, as one process.
EATER = ("sh", "-c", "echo started; exec tail /dev/zero")


@pytest.fixture(scope="module")
def machine(kubelet: Kubelet) -> Iterator[Pod]:
    """One virtual machine for all tests here, with the figures that a kubelet gives for the pod as a whole."""
    linux = pb.LinuxPodSandboxConfig(
        overhead=pb.LinuxContainerResources(cpu_shares=256, memory_limit_in_bytes=160 * MIB),
        resources=pb.LinuxContainerResources(cpu_shares=512, cpu_period=100000, cpu_quota=200000,
                                             memory_limit_in_bytes=128 * MIB),
    )  # fmt: skip
    with kubelet.pod("resources", linux=linux) as pod:
        yield pod


@pytest.fixture
def pod(machine: Pod) -> Iterator[Pod]:
    """The pod, for containers that live as long as the test."""
    yield from machine.emptied()


def limits(**fields: object) -> pb.LinuxContainerConfig:
    """A container with resources."""
    return pb.LinuxContainerConfig(resources=pb.LinuxContainerResources(**fields))  # type: ignore[arg-type]


def cgroup(pod: Pod, container: str, *files: str) -> list[str]:
    """What files of the container's own cgroup say, as the container sees them."""
    return pod.exec(container, "sh", "-c", f"cd /sys/fs/cgroup && cat {' '.join(files)}").splitlines()


def test_limits_are_those_of_the_containers_cgroup(pod: Pod) -> None:
    container = pod.run(
        "limited",
        linux=limits(
            cpu_period=50000, cpu_quota=25000, cpu_shares=512, memory_limit_in_bytes=64 * MIB,
            memory_swap_limit_in_bytes=64 * MIB, cpuset_cpus="0", cpuset_mems="0", oom_score_adj=900,
            hugepage_limits=[
                pb.HugepageLimit(page_size=size, limit=0) for size in ("64KB", "2MB", "1GB")
            ],
        ),
    )  # fmt: skip
    quota, memory, swap, weight = cgroup(
        pod, container, "cpu.max", "memory.max", "memory.swap.max", "cpu.weight"
    )
    assert (quota, memory, swap) == ("25000 50000", str(64 * MIB), "0")
    # 2 to 262144 shares become a weight of 1 to 10000.
    assert int(weight) == 1 + (512 - 2) * 9999 // 262142
    assert pod.exec(container, "cat", "/proc/1/oom_score_adj") == "900\n"


def test_no_limits(pod: Pod) -> None:
    container = pod.run("unlimited")
    assert cgroup(pod, container, "cpu.max", "memory.max") == ["max 100000", "max"]


def test_limits_change_while_it_runs(pod: Pod, cri: Cri) -> None:
    container = pod.run(
        "changing", linux=limits(memory_limit_in_bytes=64 * MIB, cpu_period=100000, cpu_quota=50000)
    )
    cri.update(container, pb.LinuxContainerResources(memory_limit_in_bytes=32 * MIB))
    assert cgroup(pod, container, "cpu.max", "memory.max") == ["50000 100000", str(32 * MIB)]
    cri.update(container, pb.LinuxContainerResources(cpu_period=100000, cpu_quota=20000, cpu_shares=2048))
    quota, memory, weight = cgroup(pod, container, "cpu.max", "memory.max", "cpu.weight")
    assert (quota, memory, int(weight)) == ("20000 100000", str(32 * MIB), 1 + (2048 - 2) * 9999 // 262142)
    shown = cri.container(container).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_quota) == (32 * MIB, 20000)


def test_out_of_memory_ends_one_container_only(pod: Pod, cri: Cri) -> None:
    sibling = pod.run("sibling")
    eater = pod.run("eater", EATER, linux=limits(memory_limit_in_bytes=16 * MIB))
    status = pod.finished(eater)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    assert pod.output("eater") == "started\n"
    assert pod.exec(sibling, "echo", "unharmed") == "unharmed\n"
    assert cri.container(sibling).state == pb.CONTAINER_RUNNING


def test_an_exec_that_takes_too_much_memory_is_no_end_of_the_container(pod: Pod, cri: Cri) -> None:
    container = pod.run("host-of-eater", linux=limits(memory_limit_in_bytes=16 * MIB))
    assert cri.exec(container, ["tail", "/dev/zero"]).exit_code == 137
    assert pod.exec(container, "echo", "alive") == "alive\n"
    assert cri.container(container).state == pb.CONTAINER_RUNNING


def test_each_container_sees_its_own_cgroup_only(pod: Pod) -> None:
    one = pod.run("one", linux=limits(memory_limit_in_bytes=48 * MIB))
    two = pod.run("two", linux=limits(memory_limit_in_bytes=24 * MIB))
    seen = [cgroup(pod, container, "memory.max", "/proc/self/cgroup") for container in (one, two)]
    assert seen == [[str(48 * MIB), "0::/"], [str(24 * MIB), "0::/"]]
    assert pod.cri.exec(one, ["sh", "-c", "echo max > /sys/fs/cgroup/memory.max"]).exit_code != 0


def test_the_machine_grows_when_the_limits_are_more_than_it_has(pod: Pod, cri: Cri) -> None:
    container = pod.run("growing")
    before_kib = memory_kib(pod, container)
    limit = before_kib * 1024 + 256 * MIB
    cri.update(container, pb.LinuxContainerResources(memory_limit_in_bytes=limit))
    assert cgroup(pod, container, "memory.max") == [str(limit)]
    added_kib = memory_kib(pod, container) - before_kib
    # In whole blocks of the guest's; the kernel's own part of what there was at the boot counts for the limit.
    assert added_kib in (128 * 1024, 256 * 1024)


def test_the_pods_statistics_count_its_processors(pod: Pod, cri: Cri) -> None:
    """They are those of the pod's control group on the host, in which the processors of the machine are."""
    before = cri.pod_stats(pod.id).linux.cpu.usage_core_nano_seconds.value
    pod.run("busy", ("sh", "-c", "while :; do :; done"))

    def counted() -> bool:
        return cri.pod_stats(pod.id).linux.cpu.usage_core_nano_seconds.value > before + 200_000_000

    eventually(counted, "the pod's statistics count its processors")


def test_cpusets_are_those_of_the_processors(pod: Pod, cri: Cri, pods_cgroup: str) -> None:
    """As the kubelet's CPU manager hands them out, to containers that run."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs a host with two CPUs")
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    folder = Path("/sys/fs/cgroup", *(() if unified else ("cpuset",)), pods_cgroup, pod.id)
    container = pod.run("pinned")
    last = max(os.sched_getaffinity(0))
    cri.update(container, pb.LinuxContainerResources(cpuset_cpus=str(last)))
    assert (folder / "cpuset.cpus").read_text() == f"{last}\n"
    cri.remove(container)
    before = "\n" if unified else (folder.parent / "cpuset.cpus").read_text()
    eventually(
        lambda: (folder / "cpuset.cpus").read_text() == before, "the processors may run anywhere again"
    )


def test_processors_come_and_go_with_the_limits(pod: Pod, cri: Cri) -> None:
    """Again and again, also where QEMU emulates them; what a program asks for is what it may use."""
    container = pod.run("scaled")
    most = int(pod.exec(container, "sh", "-c", "ls -d /sys/devices/system/cpu/cpu[0-9]* | wc -l"))
    if most < 2:
        pytest.skip("the machine has no room for another processor")
    for _ in range(20):
        cri.update(container, pb.LinuxContainerResources(cpu_period=100000, cpu_quota=200000))
        assert pod.exec(container, "nproc") == "2\n"
        cri.update(container, pb.LinuxContainerResources(cpu_period=100000, cpu_quota=50000))
        eventually(lambda: pod.exec(container, "nproc") == "1\n", "the machine shrinks")


def memory_kib(pod: Pod, container: str) -> int:
    """What the guest's kernel has."""
    return int(pod.exec(container, "grep", "MemTotal", "/proc/meminfo").split()[1])
