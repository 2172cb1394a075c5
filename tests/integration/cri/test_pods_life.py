"""Pods from outside: how they begin and end, beside each other, with their namespaces, and under a new containerd."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.integration.cri.client import CriError
from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import BY_SANDBOX_API
from tests.integration.cri.streams import Streams

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.integration.cri.conftest import CriContainerd
    from tests.integration.cri.kubelet import Kubelet, Pod

MIB = 1 << 20
with_pause = pytest.mark.skipif(BY_SANDBOX_API, reason="pods made by the Sandbox API have no pause container")


@pytest.fixture(scope="module")
def shared_pid(kubelet: Kubelet) -> Iterator[Pod]:
    """A pod whose containers see each other's processes."""
    dns = pb.DNSConfig(servers=["10.9.8.7"], searches=["a.example", "b.example"], options=["ndots:5"])
    with kubelet.pod("shared", shared_pid=True, dns_config=dns, hostname="web-0") as pod:
        yield pod


@with_pause
def test_shared_pid_namespace_begins_with_the_pause_container(shared_pid: Pod) -> None:
    one, two = (shared_pid.run(name, ["sh", "-c", f"exec sleep 100{name}"]) for name in ("1", "2"))
    for container in (one, two):
        commands = shared_pid.exec(container, "ps", "-o", "pid,args").splitlines()
        assert any(line.split()[0] == "1" and "trap" in line for line in commands), commands
        assert sum("sleep 100" in line for line in commands) == 2, commands
    # Signals cross from one container to the other.
    shared_pid.exec(one, "sh", "-c", "kill -TERM $(ps -o pid,args | awk '$3 == 1002 {print $1}')")
    assert shared_pid.finished(two).exit_code == 143
    for container in (one, two):
        shared_pid.cri.remove(container)


def test_stop_of_one_container_leaves_the_shared_namespace(shared_pid: Pod) -> None:
    one, two = (shared_pid.run(name, ["sleep", "1000"]) for name in ("3", "4"))
    shared_pid.cri.stop(one)
    assert shared_pid.exec(two, "pidof", "sleep").split() != []
    assert shared_pid.cri.container(two).state == pb.CONTAINER_RUNNING
    for container in (one, two):
        shared_pid.cri.remove(container)


def test_host_name_and_resolver(shared_pid: Pod) -> None:
    container = shared_pid.run("names")
    assert shared_pid.exec(container, "hostname") == "web-0\n"
    assert shared_pid.exec(container, "cat", "/etc/hostname") == "web-0\n"
    lines = shared_pid.exec(container, "cat", "/etc/resolv.conf").split("\n")
    assert [line for line in lines if line] == [
        "search a.example b.example",
        "nameserver 10.9.8.7",
        "options ndots:5",
    ]
    shared_pid.cri.remove(container)


@pytest.mark.skipif(
    BY_SANDBOX_API, reason="containerd 2.1 itself crashes: it wants the pod's network namespace"
)
def test_pod_with_the_hosts_network(kubelet: Kubelet) -> None:
    with kubelet.pod(host_network=True, hostname="") as pod:
        container = pod.run("one")
        assert kubelet.cri.pod_status(pod.id).network.ip == ""
        # The host's name goes with its network.
        assert pod.exec(container, "hostname").strip() == os.uname().nodename
        # Not the host's interfaces: the machine has its own.
        assert "kp" not in pod.exec(container, "cat", "/proc/net/dev")


def test_two_pods_are_two_machines(kubelet: Kubelet) -> None:
    with kubelet.pod("one") as one, kubelet.pod("two") as two:
        first, second = one.run("c"), two.run("c")
        identities = {
            pod.exec(container, "cat", "/proc/sys/kernel/random/boot_id")
            for pod, container in ((one, first), (two, second))
        }
        assert len(identities) == 2
        names = [pod.exec(container, "hostname") for pod, container in ((one, first), (two, second))]
        assert names == ["one\n", "two\n"]
        kubelet.cri.stop_pod(one.id)
        assert two.exec(second, "echo", "alive") == "alive\n"
        assert kubelet.cri.container(first).state == pb.CONTAINER_EXITED


def test_stop_of_a_pod_ends_its_containers_and_its_machine(
    kubelet: Kubelet, containerd: CriContainerd
) -> None:
    pod = kubelet.run_pod("stopped")
    containers = [pod.run(name) for name in ("a", "b", "c")]
    pod.exec(containers[0], "true")
    kubelet.cri.stop_pod(pod.id)
    assert kubelet.cri.pod_status(pod.id).state == pb.SANDBOX_NOTREADY
    for container in containers:
        status = kubelet.cri.container(container)
        assert (status.state, status.exit_code) == (pb.CONTAINER_EXITED, 137)
    if not BY_SANDBOX_API:  # there the shim answers questions until the pod is removed
        assert not Path("/run/kata-py", pod.id).exists()
    kubelet.cri.stop_pod(pod.id)
    with pytest.raises(CriError):
        pod.run("late")
    kubelet.cri.remove_pod(pod.id)
    kubelet.cri.remove_pod(pod.id)
    assert kubelet.cri.containers(pod.id) == []


def test_pod_can_be_removed_while_everything_runs(kubelet: Kubelet) -> None:
    pod = kubelet.run_pod("forced")
    container = pod.run("a")
    pod.run("done", ["true"])
    with Streams(kubelet.cri.exec_url(container, ["sh", "-c", "echo up; cat"])) as streams:
        streams.wait_for(b"up")
        kubelet.cri.remove_pod(pod.id)
    assert pod.id not in [item.id for item in kubelet.cri.pods()]


def test_pods_survive_a_new_containerd(kubelet: Kubelet, containerd: CriContainerd) -> None:
    with kubelet.pod("kept") as pod:
        running = pod.run(
            "running", ["sh", "-c", "trap 'exit 21' TERM; while :; do echo tick; sleep 0.2; done"]
        )
        ended = pod.run("ended", ["sh", "-c", "exit 5"])
        meanwhile = pod.run(
            "meanwhile", ["sh", "-c", "while ! [ -e /go ]; do sleep 0.1; done; sleep 1; exit 6"]
        )
        pod.finished(ended)
        pod.exec(meanwhile, "touch", "/go")
        containerd.crash_and_restart()
        assert kubelet.cri.pod_status(pod.id).state == pb.SANDBOX_READY
        assert kubelet.cri.container(running).state == pb.CONTAINER_RUNNING
        assert pod.finished(ended).exit_code == 5
        assert pod.finished(meanwhile).exit_code == 6
        assert pod.exec(running, "echo", "alive") == "alive\n"
        later = pod.run("later", ["sh", "-c", "echo new; exit 7"])
        assert pod.finished(later).exit_code == 7
        assert pod.output("later") == "new\n"
        kubelet.cri.stop(running, grace_s=30)
        assert kubelet.cri.container(running).exit_code == 21
        before = pod.output("running").count("tick")
        assert before > 0


def test_resources_of_the_pod_and_its_containers(kubelet: Kubelet) -> None:
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB, cpu_quota=50_000, cpu_period=100_000)
    linux = pb.LinuxPodSandboxConfig(resources=limits, overhead=pb.LinuxContainerResources(cpu_quota=10_000))
    with kubelet.pod("sized", linux=linux) as pod:
        container = pod.run("c", linux=pb.LinuxContainerConfig(resources=limits))
        assert pod.exec(container, "cat", "/sys/fs/cgroup/memory.max").strip() == str(64 * MIB)


def test_failed_pod_leaves_nothing(kubelet: Kubelet, containerd: CriContainerd) -> None:
    good = containerd.config.read_text()
    containerd.config.write_text(good.replace("vmlinux", "no-such-kernel"))
    try:
        with pytest.raises(CriError, match="no-such-kernel") as refused:
            kubelet.run_pod("failed")
    finally:
        containerd.config.write_text(good)
    assert "Traceback" not in refused.value.details
    assert not any(pod.metadata.name.startswith("failed") for pod in kubelet.cri.pods())
