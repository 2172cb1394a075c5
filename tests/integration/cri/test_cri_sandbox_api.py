"""Pods by containerd's Sandbox API (`sandboxer = "shim"`): no pause container, the machine itself is the pod."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from shim.api.gen import cgroups_v1_pb2, cgroups_v2_pb2
from shim.api.services import SANDBOX
from shim.stats import host_is_unified
from tests.integration.containerd import SOCKET_FOLDER
from tests.integration.cri.gen import cri_pb2 as pb
from tests.integration.cri.kubelet import SANDBOX_API_HANDLER, eventually
from ttrpc import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shim.api.gen import sandbox_pb2
    from tests.integration.containerd import Containerd
    from tests.integration.cri.kubelet import Kubelet, Pod


@pytest.fixture(autouse=True)
def _containerd_2(containerd: Containerd) -> None:
    if containerd.server.generation() < 2:
        pytest.skip('`sandboxer = "shim"` needs containerd 2.0 or newer: see KATA_PY_TEST_CONTAINERD_DIR')


@pytest.fixture
def pod(kubelet: Kubelet) -> Iterator[Pod]:
    with kubelet.pod(handler=SANDBOX_API_HANDLER) as pod:
        yield pod


def machine_pid(pod: Pod) -> int:
    """The pid of the pod's QEMU."""
    record = json.loads(Path(f"/run/kata-py/{pod.id}/record.json").read_text())
    return int(record["helpers"]["qemu"][0])


def test_pod_without_pause_container(containerd: Containerd, pod: Pod) -> None:
    assert pod.cri.pod_status(pod.id).state == pb.SANDBOX_READY
    assert containerd.checked("containers", "ls", "--quiet") == ""
    one, two = pod.run("one"), pod.run("two")
    assert pod.exec(one, "hostname") == pod.exec(two, "hostname") == "pod\n"
    assert pod.exec(one, "cat", "/etc/hostname") == "pod\n"
    # One machine for both: what one writes to the pod's shared memory, the other finds there.
    pod.exec(one, "sh", "-c", "echo hello > /dev/shm/word")
    assert pod.exec(two, "cat", "/dev/shm/word") == "hello\n"
    pod.cri.stop(one)
    pod.cri.remove(one)
    pod.cri.stop(two)
    assert pod.cri.pod_status(pod.id).state == pb.SANDBOX_READY
    third = pod.run("three", ["sh", "-c", "exit 7"])
    assert pod.finished(third).exit_code == 7


def test_settings_of_the_pod(kubelet: Kubelet) -> None:
    dns = pb.DNSConfig(servers=["10.9.8.7"], searches=["a.test"], options=["ndots:3"])
    linux = pb.LinuxPodSandboxConfig(sysctls={"kernel.shm_rmid_forced": "1"})
    with kubelet.pod(handler=SANDBOX_API_HANDLER, dns_config=dns, linux=linux) as pod:
        container = pod.run("app")
        resolv_conf = pod.exec(container, "cat", "/etc/resolv.conf")
        assert resolv_conf == "search a.test\nnameserver 10.9.8.7\noptions ndots:3\n"
        assert pod.exec(container, "cat", "/proc/sys/kernel/shm_rmid_forced") == "1\n"


def test_shared_processes(kubelet: Kubelet) -> None:
    with kubelet.pod(handler=SANDBOX_API_HANDLER, shared_pid=True) as pod:
        one, two = pod.run("one"), pod.run("two")
        pod.cri.stop(
            one
        )  # its end is not that of the others, as it would be if the first one held the namespace
        assert "sleep 1000" in pod.exec(two, "ps", "-o", "args")
        third = pod.run("three", ["sleep", "4321"])
        assert "sleep 4321" in pod.exec(two, "ps", "-o", "args")
        pod.cri.stop(third)


def test_stop_with_running_containers(kubelet: Kubelet) -> None:
    with kubelet.pod(handler=SANDBOX_API_HANDLER) as pod:
        container, pid = pod.run("app"), machine_pid(pod)
        pod.cri.stop_pod(pod.id)
        assert pod.cri.pod_status(pod.id).state == pb.SANDBOX_NOTREADY
        assert pod.cri.container(container).state == pb.CONTAINER_EXITED
        assert not Path(f"/proc/{pid}").exists()


def test_machine_dies(pod: Pod) -> None:
    container = pod.run("app")
    os.kill(machine_pid(pod), signal.SIGKILL)
    eventually(lambda: pod.cri.pod_status(pod.id).state == pb.SANDBOX_NOTREADY, "the pod is not ready")
    assert pod.finished(container).exit_code == 255


def test_metrics_of_the_machine(containerd: Containerd, pod: Pod) -> None:
    """Asked of the shim itself: containerd has no call for it that a client could make without a program of its own."""

    async def ask() -> sandbox_pb2.SandboxMetricsResponse:
        key = f"{containerd.server.socket}/{containerd.namespace}/{pod.id}"
        client = await Client.connect_unix(f"{SOCKET_FOLDER}/{hashlib.sha256(key.encode()).hexdigest()}")
        try:
            method: Any = SANDBOX["SandboxMetrics"]
            return await client.call(SANDBOX.name, method, method.request(sandbox_id=pod.id))
        finally:
            await client.aclose()

    data = asyncio.run(ask()).metrics.data
    if host_is_unified():
        v2 = cgroups_v2_pb2.Metrics.FromString(data.value)
        cpu_s, memory = v2.cpu.usage_usec / 1e6, v2.memory.usage
    else:
        v1 = cgroups_v1_pb2.Metrics.FromString(data.value)
        cpu_s, memory = v1.cpu.usage.total / 1e9, v1.memory.usage.usage
    # A guest that has booted has used its processor, and some of its memory; the configuration gives it 2 GiB at most.
    assert cpu_s > 0.1
    assert 32 << 20 < memory < 3 << 30


def test_containerd_restarts(containerd: Containerd, kubelet: Kubelet, pod: Pod) -> None:
    container = pod.run("app")
    pid = containerd.server.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    containerd.server.start()
    kubelet.cri.wait_until_ready()
    assert pod.cri.pod_status(pod.id).state == pb.SANDBOX_READY
    assert pod.exec(container, "echo", "still here") == "still here\n"
    assert pod.exec(pod.run("later"), "hostname") == "pod\n"


def test_container_that_only_names_the_sandbox(containerd: Containerd, pod: Pod) -> None:
    """Without CRI's annotations: containerd knows the way to the sandbox, and starts no other shim."""
    for _ in range(2):  # one after the other: the sandbox is there all the time
        done = containerd.run("cat", "/proc/sys/kernel/hostname", options=("--rm", "--sandbox", pod.id))
        assert (done.returncode, done.stdout, done.stderr) == (0, "pod\n", "")
    assert pod.cri.pod_status(pod.id).state == pb.SANDBOX_READY
