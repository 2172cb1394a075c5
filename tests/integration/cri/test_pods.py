"""One pod with several containers: what CRI shows of it, and how its containers live and end side by side."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import busybox_image
import pytest

from tests.integration import containerd as support
from tests.integration.cri.client import CriError
from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import HANDLER, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.cri.client import Cri
    from tests.integration.cri.kubelet import Kubelet, Pod

MIB = 1 << 20
NANOSECONDS = 10**9


@pytest.fixture(scope="module")
def processes_before(containerd: support.Containerd) -> frozenset[int]:
    """What ran before the pod of this module."""
    return frozenset(support.caused_by(containerd))


@pytest.fixture(scope="module")
def pod(kubelet: Kubelet, processes_before: frozenset[int]) -> Iterator[Pod]:
    """One virtual machine for all tests here."""
    with kubelet.pod("many", labels={"app": "test"}, annotations={"note": "kept"}) as pod:
        yield pod


@pytest.fixture(scope="module")
def first(pod: Pod) -> str:
    """A container that runs all the time."""
    return pod.run("first")


def programs(containerd: support.Containerd, before: frozenset[int]) -> list[str]:
    """Names of the programs that have been started since."""
    running = support.caused_by(containerd)
    return sorted(Path(words.split()[0]).name for pid, words in running.items() if pid not in before)


def test_pod_is_ready_as_it_was_asked_for(cri: Cri, pod: Pod) -> None:
    status = cri.pod_status(pod.id)
    assert status.state == pb.SANDBOX_READY
    assert status.metadata == pod.config.metadata
    assert status.runtime_handler == HANDLER
    assert status.network.ip.startswith("10.213.0.")
    assert (status.labels["app"], status.annotations["note"]) == ("test", "kept")
    assert (pod.id, pb.SANDBOX_READY) in [(item.id, item.state) for item in cri.pods()]


def test_three_containers_share_one_shim_and_one_machine(
    cri: Cri, pod: Pod, first: str, containerd: support.Containerd, processes_before: frozenset[int]
) -> None:
    others = [pod.run(name) for name in ("second", "third")]
    names = programs(containerd, processes_before)
    assert sum(name.startswith("qemu-system-") for name in names) == 1
    # Python runs the shim; nothing else here is a Python program.
    assert sum(name.startswith("python") for name in names) == 1, names
    kernels = {
        pod.exec(container, "cat", "/proc/sys/kernel/random/boot_id") for container in (first, *others)
    }
    assert len(kernels) == 1
    assert kernels != {Path("/proc/sys/kernel/random/boot_id").read_text()}
    listed = {(item.id, item.state) for item in cri.containers(pod.id)}
    assert listed == {(container, pb.CONTAINER_RUNNING) for container in (first, *others)}
    for container in others:
        cri.stop(container)
        cri.remove(container)
    assert [item.id for item in cri.containers(pod.id)] == [first]


def test_containers_have_their_own_files_and_processes(pod: Pod, first: str, cri: Cri) -> None:
    other = pod.run("other")
    pod.exec(other, "sh", "-c", "echo mine > /tmp/file")
    assert cri.exec(first, ["cat", "/tmp/file"]).exit_code == 1
    # Its init is the first process of its own namespace, and the other container's is not to be seen.
    assert pod.exec(other, "cat", "/proc/1/comm") == "sh\n"
    assert len(pod.exec(other, "pidof", "sleep").split()) == 1
    cri.stop(other)
    cri.remove(other)


@pytest.mark.parametrize(
    ("command", "status", "reason"),
    [
        ("exit 0", 0, "Completed"),
        ("exit 41", 41, "Error"),
    ],
)
def test_status_of_an_ended_container(cri: Cri, pod: Pod, command: str, status: int, reason: str) -> None:
    before = time.time_ns()
    # A name of its own each time: names are reserved until the container is removed.
    container = pod.run(f"ends-{status}", ["sh", "-c", command])
    ended = pod.finished(container)
    assert (ended.exit_code, ended.reason) == (status, reason)
    assert before < ended.created_at < ended.started_at <= ended.finished_at < time.time_ns()
    assert ended.metadata.name == f"ends-{status}"
    assert ended.image.image == busybox_image.NAME
    cri.remove(container)
    with pytest.raises(CriError, match="NOT_FOUND"):
        cri.container(container)


def test_status_of_a_running_container(cri: Cri, first: str) -> None:
    status = cri.container(first)
    assert status.state == pb.CONTAINER_RUNNING
    assert status.started_at >= status.created_at > 0
    assert (status.finished_at, status.exit_code, status.reason) == (0, 0, "")


def test_exec_that_takes_too_long_is_killed(cri: Cri, pod: Pod, first: str) -> None:
    with pytest.raises(CriError) as refused:
        cri.exec(first, ["sh", "-c", "echo $$ > /tmp/pid; exec sleep 1000"], timeout_s=1)
    assert refused.value.code.name in ("DEADLINE_EXCEEDED", "UNKNOWN")
    assert "timeout 1s exceeded" in refused.value.details
    assert cri.exec(first, ["sh", "-c", "test -d /proc/$(cat /tmp/pid)"]).exit_code == 1
    assert cri.container(first).state == pb.CONTAINER_RUNNING


def test_container_that_cannot_start_leaves_the_pod_alone(cri: Cri, pod: Pod, first: str) -> None:
    container = pod.create("bad", ["/no/such/program"])
    with pytest.raises(CriError, match="/no/such/program") as refused:
        cri.start(container)
    assert "Traceback" not in refused.value.details
    assert "\n" not in refused.value.details
    status = cri.container(container)
    assert (status.state, status.reason) == (pb.CONTAINER_EXITED, "StartError")
    assert status.exit_code == 128
    cri.remove(container)
    assert cri.pod_status(pod.id).state == pb.SANDBOX_READY
    assert pod.exec(first, "echo", "alive") == "alive\n"


def test_container_restarts_with_its_next_attempt(cri: Cri, pod: Pod) -> None:
    old = pod.run("again", ["sh", "-c", "echo first life; exit 1"])
    pod.finished(old)
    new = pod.run("again", ["sh", "-c", "echo second life"], attempt=1)
    assert new != old
    assert pod.finished(new).exit_code == 0
    assert cri.container(new).metadata.attempt == 1
    assert (pod.output("again"), pod.output("again", attempt=1)) == ("first life\n", "second life\n")
    assert {item.id for item in cri.containers(pod.id)} >= {old, new}
    cri.remove(old)
    cri.remove(new)


def test_stop_gives_the_container_its_time(cri: Cri, pod: Pod) -> None:
    container = pod.run(
        "polite", ["sh", "-c", "trap 'echo bye; exit 12' TERM; echo up; while :; do sleep 0.1; done"]
    )
    eventually(lambda: pod.output("polite") == "up\n", "the trap is set")
    cri.stop(container, grace_s=30)
    assert cri.container(container).exit_code == 12
    assert pod.output("polite") == "up\nbye\n"
    cri.remove(container)


def test_stop_kills_what_ignores_the_signal(cri: Cri, pod: Pod) -> None:
    container = pod.run("stubborn", ["sh", "-c", "trap '' TERM; echo up; while :; do sleep 0.1; done"])
    eventually(lambda: pod.output("stubborn") == "up\n", "the signal is ignored")
    before = time.monotonic()
    cri.stop(container, grace_s=1)
    assert time.monotonic() - before >= 1
    assert cri.container(container).exit_code == 137
    cri.remove(container)


def test_stop_without_grace_kills_at_once(cri: Cri, pod: Pod) -> None:
    container = pod.run("killed", ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"])
    cri.stop(container)
    assert cri.container(container).exit_code == 137
    cri.stop(container)  # once more is no error
    cri.remove(container)
    cri.remove(container)


def test_remove_ends_a_running_container(cri: Cri, pod: Pod) -> None:
    container = pod.run("running")
    cri.remove(container)
    assert container not in {item.id for item in cri.containers(pod.id)}


def test_limits_reach_the_container_and_can_be_changed(cri: Cri, pod: Pod) -> None:
    limits = pb.LinuxContainerResources(
        memory_limit_in_bytes=64 * MIB, cpu_period=100_000, cpu_quota=50_000, cpu_shares=512
    )
    container = pod.run("limited", linux=pb.LinuxContainerConfig(resources=limits))
    files = ["cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max"]
    assert pod.exec(container, *files).splitlines() == [str(64 * MIB), "50000 100000"]
    cri.update(container, pb.LinuxContainerResources(memory_limit_in_bytes=96 * MIB, cpu_quota=20_000))
    assert pod.exec(container, *files).splitlines() == [str(96 * MIB), "20000 100000"]
    cri.stop(container)
    cri.remove(container)


def test_out_of_memory_is_the_reason(cri: Cri, pod: Pod) -> None:
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=16 * MIB)
    command = ["sh", "-c", "x=x; while :; do x=$x$x; done"]
    container = pod.run("greedy", command, linux=pb.LinuxContainerConfig(resources=limits))
    status = pod.finished(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    cri.remove(container)


def test_statistics_are_the_guests(cri: Cri, pod: Pod, first: str) -> None:
    pod.exec(first, "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
    used_before = cpu_us(pod, first)
    stats = cri.stats(first)
    assert stats.attributes.id == first
    assert (
        NANOSECONDS // 100
        < 1000 * used_before
        <= stats.cpu.usage_core_nano_seconds.value
        <= 1000 * cpu_us(pod, first)
    )
    usage, working_set = stats.memory.usage_bytes.value, stats.memory.working_set_bytes.value
    assert 4096 < working_set <= usage < 64 * MIB
    assert 4096 < stats.memory.rss_bytes.value <= usage
    assert stats.memory.page_faults.value > 0
    inside = dict(line.split() for line in pod.exec(first, "cat", "/sys/fs/cgroup/memory.stat").splitlines())
    # Page cache that could be given back does not count as used.
    assert abs(working_set - (usage - int(inside["inactive_file"]))) < MIB
    (listed,) = (item for item in cri.all_stats(pod.id) if item.attributes.id == first)
    assert listed.cpu.usage_core_nano_seconds.value >= stats.cpu.usage_core_nano_seconds.value


def cpu_us(pod: Pod, container: str) -> int:
    """What the guest's kernel has counted for the container."""
    return int(pod.exec(container, "cat", "/sys/fs/cgroup/cpu.stat").split()[1])


def test_statistics_of_the_pod_have_its_containers(cri: Cri, pod: Pod, first: str) -> None:
    stats = cri.pod_stats(pod.id)
    assert stats.attributes.id == pod.id
    (container,) = (item for item in stats.linux.containers if item.attributes.id == first)
    assert container.cpu.usage_core_nano_seconds.value > 0
    assert 4096 < container.memory.working_set_bytes.value < 64 * MIB


def test_pod_answers_for_a_container_that_is_gone(cri: Cri) -> None:
    with pytest.raises(CriError, match="NOT_FOUND"):
        cri.exec("0" * 64, ["true"])
